"""`python -m bunny_lora` is the same as the `bunny-lora` command."""

from bunny_lora.cli import main

raise SystemExit(main())
