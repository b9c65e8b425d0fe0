"""What the longer commands of `bunny-lora` take."""

from __future__ import annotations

import argparse
import contextlib
import os

from bunny_lora.core import requests
from bunny_lora.core.paths import new, typed, typed_or_name


def with_config(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add what every command takes that reads a configuration."""
    parser.add_argument("--config", type=typed, help="YAML file; default: your data's or the demo's")
    parser.add_argument(
        "--set",
        action="append",
        type=as_text,
        default=[],
        metavar="KEY=VALUE",
        help="training.seed=1; repeatable",
    )
    return parser


def of_generate(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add what `generate` takes."""
    parser.add_argument(
        "--lora-weights",
        action="append",
        metavar="PATH[=WEIGHT]",
        help="a run's folder, …/checkpoint-100 or a .safetensors file; repeatable, to mix several",
    )
    parser.add_argument(
        "--base-model", type=typed_or_name, help="default: the one the run was trained on"
    )
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", type=as_text, help="repeatable")
    prompts.add_argument("--prompts", type=typed, metavar="FILE", help="one a line; needs --out")
    parser.add_argument(
        "--out",
        "--output",
        type=new,
        help="PNG file (out.png) or folder; --prompts: a folder, the same command goes on in it",
    )
    parser.add_argument("--negative-prompt", type=as_text)
    parser.add_argument("--seed", type=int, action="append", help="repeatable; default 42")
    parser.add_argument(
        "--steps", type=int, help="denoising steps; default: as the run recommends, or 25"
    )
    parser.add_argument("--guidance", type=float, help="guidance scale; default: the run's, or 7.5")
    parser.add_argument(
        "--lora-scale", type=float, help="0: base model, 1: as trained; default: the run's"
    )
    parser.add_argument("--width", type=int, help="pixels; default: the run's, or the model's own")
    parser.add_argument("--height", type=int)
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--sampler", help="as in sampling.sampler; default: the run's, or the model's own")
    way.add_argument(
        "--reference",
        action="store_true",
        help="to the bit what diffusers and peft alone draw, which is slower",
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "auto"])
    return parser


def of_export(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add what `export` takes."""
    kinds = ["peft", "diffusers", "kohya", "merged", "checkpoint", "kohya-sd1"]
    parser.add_argument(
        "--lora-weights", type=typed, required=True, help="…/final, …/checkpoint-100 or a run's folder"
    )
    parser.add_argument("--out", "--output", type=new, required=True, help="a new folder")
    parser.add_argument(
        "--base-model", type=typed_or_name, help="default: the one the run was trained on"
    )
    parser.add_argument(
        "--format",
        action="append",
        choices=kinds,
        help="repeatable; default: peft, diffusers and kohya",
    )
    parser.add_argument("--hub", metavar="OWNER/NAME", help="upload too, to this private repository")
    return parser


def of_sweep(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add what `sweep` takes."""
    parser.add_argument("file", type=typed, help="YAML with config, output_dir and grid")
    parser.add_argument(
        "--slurm",
        nargs="*",
        metavar="KEY=VALUE",
        help="as jobs of a SLURM cluster, with submitit's options: slurm_partition=cpu timeout_min=600",
    )
    return parser


def of_watch(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add what `watch` takes."""
    parser.add_argument(
        "runs",
        nargs="*",
        type=typed,
        help="folders; default: those in outputs/ that work, or the newest",
    )
    parser.add_argument(
        "--ask", choices=requests.KINDS, help="ask them to save, to draw samples, or to save and stop"
    )
    parser.add_argument("--once", action="store_true", help="as they are now, instead of as they go on")
    return parser


def as_text(argument: str) -> str:
    """Return a typed text that the locale could not decode as the UTF-8 that it mostly is."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        with contextlib.suppress(UnicodeError):
            return os.fsencode(argument).decode()
    return argument
