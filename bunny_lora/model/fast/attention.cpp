// Attention without a mask, forwards and backwards, in tiles that stay in the cache
// (https://arxiv.org/abs/2205.14135), for float32 and bfloat16.
//
// Everything is kept transposed, keys by queries, so that each step of the softmax works on vectors of
// queries and never across one. The compiler turns the vectors into what the machine has (AVX2,
// AVX-512, NEON); the one instruction named here is AVX-512's product of bfloat16 pairs.
//
// Sizes: D features, D_ rounded up to ROWS; tiles of KEYS keys and QUERIES queries.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include <omp.h>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;
#else
constexpr int LANES = 8, ROWS = 4;
#endif
constexpr int COLUMNS = 3;  // vectors; ROWS x COLUMNS sums are held in registers
constexpr int QUERIES = 2 * COLUMNS * LANES, KEYS = 64;

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef int32_t Int __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

int round_up(int n, int to) { return (n + to - 1) / to * to; }

Vec &at(float *p) { return *reinterpret_cast<Vec *>(p); }
const Vec &at(const float *p) { return *reinterpret_cast<const Vec *>(p); }
Vec spread(float x) { return x - Vec{}; }
Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// e^x for x <= 0, to 2e-7 of it; 0 below -87.
Vec exp_of(Vec x) {
    const Int none = x < -87.0f;
    const Vec magic = spread(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
    x = larger(x, spread(-87.0f));
    const Vec n = (x * 1.44269504f + magic) - magic;
    const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec p = r * (1.0f / 5040) + (1.0f / 720);
    p = p * r + (1.0f / 120);
    p = p * r + (1.0f / 24);
    p = p * r + (1.0f / 6);
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const Int scale = (__builtin_convertvector(n, Int) + 127) << 23;
    const Vec result = p * reinterpret_cast<const Vec &>(scale);
    return none ? Vec{} : result;
}

// How numbers lie in memory, and what a step of a product is. A row holds numbers one after the other.
// A panel holds UNIT rows interleaved, so that a vector has UNIT numbers of each column.

struct Float32 {
    typedef float Number;
    static constexpr int UNIT = 1;
    static float read(Number x) { return x; }
    static Number write(float x) { return x; }
    static void step(Vec *sums, const Number *a, const Vec *b, int columns) {
        for (int c = 0; c < columns; c++) sums[c] += b[c] * *a;
    }
    static void pack(Number *panel, const Vec *rows) { at(panel) = rows[0]; }
    static void pack_row(Number *row, Vec x) { at(row) = x; }
};

struct BFloat16 {
    typedef uint16_t Number;
    static constexpr int UNIT = 2;
    static float read(Number x) {
        const uint32_t bits = uint32_t(x) << 16;
        float result;
        std::memcpy(&result, &bits, 4);
        return result;
    }
    static Number write(float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        if (x != x) return 0x7fc0;
        return Number((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    static void step(Vec *sums, const Number *a, const Vec *b, int columns) {
        uint32_t pair;
        std::memcpy(&pair, a, 4);
#if defined(__AVX512BF16__)
        const auto left = (__m512bh)_mm512_set1_epi32(int(pair));
        for (int c = 0; c < columns; c++) {
            const auto right = (__m512bh)reinterpret_cast<const __m512i &>(b[c]);
            sums[c] = (Vec)_mm512_dpbf16_ps((__m512)sums[c], left, right);
        }
#else
        const uint32_t halves[2] = {pair << 16, pair & 0xffff0000u};
        float first, second;
        std::memcpy(&first, &halves[0], 4);
        std::memcpy(&second, &halves[1], 4);
        for (int c = 0; c < columns; c++) {
            const Bits bits = reinterpret_cast<const Bits &>(b[c]);
            const Bits low = bits << 16, high = bits & 0xffff0000u;
            sums[c] += reinterpret_cast<const Vec &>(low) * first;
            sums[c] += reinterpret_cast<const Vec &>(high) * second;
        }
#endif
    }
    static Bits rounded(Vec x) {  // to the nearest, in the upper half; no NaN comes here
        const Bits bits = reinterpret_cast<const Bits &>(x);
        return bits + 0x7fff + (bits >> 16 & 1);
    }
    static void pack(Number *panel, const Vec *rows) {
        const Bits pairs = (rounded(rows[0]) >> 16) | (rounded(rows[1]) & 0xffff0000u);
        *reinterpret_cast<Bits *>(panel) = pairs;
    }
    static void pack_row(Number *row, Vec x) {
        typedef Number Half __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
        *reinterpret_cast<Half *>(row) = __builtin_convertvector(rounded(x) >> 16, Half);
    }
};

// sums [ROWS, COLUMNS vectors] of c (+)= a · b; a by rows, b as a panel of `width` columns.
template <class F, int C>
inline void block(const typename F::Number *a, int a_row, const typename F::Number *b, int width,
                  float *c, int c_row, int depth, bool add) {
    Vec sums[ROWS][C] = {};
    for (int k = 0; k < depth; k += F::UNIT, b += F::UNIT * width) {
        Vec right[C];
        for (int i = 0; i < C; i++)
            right[i] = *reinterpret_cast<const Vec *>(b + i * F::UNIT * LANES);
        for (int r = 0; r < ROWS; r++) F::step(sums[r], a + r * a_row + k, right, C);
    }
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < C; i++) {
            float *place = c + r * c_row + i * LANES;
            at(place) = add ? at(place) + sums[r][i] : sums[r][i];
        }
}

// c [rows, width] (+)= a [rows, depth] · b [depth, width]
template <class F>
void product(const typename F::Number *a, int a_row, const typename F::Number *b, int width, float *c,
             int rows, int depth, bool add) {
    for (int j = 0; j < width;) {
        const int left = (width - j) / LANES, columns = left == 4 ? 2 : std::min(left, COLUMNS);
        for (int r = 0; r < rows; r += ROWS) {
            const auto *a_here = a + r * a_row;
            const auto *b_here = b + j * F::UNIT;
            float *c_here = c + r * width + j;
            if (columns == 3) block<F, 3>(a_here, a_row, b_here, width, c_here, width, depth, add);
            if (columns == 2) block<F, 2>(a_here, a_row, b_here, width, c_here, width, depth, add);
            if (columns == 1) block<F, 1>(a_here, a_row, b_here, width, c_here, width, depth, add);
        }
        j += columns * LANES;
    }
}

// A [tokens, D] of one head as torch keeps it; the last dimension is dense.
template <class F> struct Tokens {
    typename F::Number *start;
    int64_t stride;
    int count, features;
    typename F::Number *row(int i) const { return start + i * stride; }
};

template <class F> using Buffer = std::vector<typename F::Number>;

// [count_, D_], zeros beyond
template <class F> void copy_rows(Buffer<F> &to, const Tokens<F> &from, int first, int count, int d_) {
    std::fill(to.begin(), to.end(), 0);
    for (int i = 0; i < std::min(count, from.count - first); i++)
        std::copy_n(from.row(first + i), from.features, &to[size_t(i) * d_]);
}

// [D_, width], zeros beyond
template <class F> void copy_columns(Buffer<F> &to, const Tokens<F> &from, int width) {
    std::fill(to.begin(), to.end(), 0);
    for (int i = 0; i < from.count; i++)
        for (int d = 0; d < from.features; d++) to[size_t(d) * width + i] = from.row(i)[d];
}

// A panel of depth D_ and a column for each of QUERIES tokens
template <class F> void panel_of_features(Buffer<F> &to, const Tokens<F> &from, int first) {
    std::fill(to.begin(), to.end(), 0);
    for (int i = 0; i < std::min(QUERIES, from.count - first); i++)
        for (int d = 0; d < from.features; d++)
            to[(size_t(d) / F::UNIT * QUERIES + i) * F::UNIT + d % F::UNIT] = from.row(first + i)[d];
}

// A panel of depth QUERIES and a column for each of `width` features
template <class F>
void panel_of_tokens(Buffer<F> &to, const Tokens<F> &from, int first, int width) {
    std::fill(to.begin(), to.end(), 0);
    for (int i = 0; i < std::min(QUERIES, from.count - first); i++)
        for (int d = 0; d < from.features; d++)
            to[(size_t(i) / F::UNIT * width + d) * F::UNIT + i % F::UNIT] = from.row(first + i)[d];
}

// tile [KEYS, QUERIES] as a panel of depth KEYS
template <class F> void panel_of_tile(Buffer<F> &to, const float *tile) {
    for (int j = 0; j < KEYS; j += F::UNIT)
        for (int i = 0; i < QUERIES; i += LANES) {
            const Vec rows[2] = {at(tile + j * QUERIES + i), at(tile + (j + F::UNIT - 1) * QUERIES + i)};
            F::pack(&to[size_t(j) * QUERIES + i * F::UNIT], rows);
        }
}

template <class F> void rows_of_tile(Buffer<F> &to, const float *tile) {
    for (int p = 0; p < KEYS * QUERIES; p += LANES) F::pack_row(&to[p], at(tile + p));
}

struct Shape {
    int64_t batch, heads, queries, keys, features;
    float scale;
};

template <class F> Tokens<F> head_of(void *tensor, const int64_t *strides, int64_t head,
                                     const Shape &s, int64_t count) {
    auto *start = static_cast<typename F::Number *>(tensor);
    start += head / s.heads * strides[0] + head % s.heads * strides[1];
    return {start, strides[2], int(count), int(s.features)};
}

// What a thread needs for one head after another.
template <class F> struct Head {
    int d_, keys_, width;
    Buffer<F> k, v_columns, panel, tile_panel;
    std::vector<float> tile, sums;
    explicit Head(const Shape &s)
        : d_(round_up(s.features, ROWS)), keys_(round_up(s.keys, KEYS)),
          width(round_up(s.features, LANES)), k(size_t(keys_) * d_), v_columns(size_t(keys_) * d_),
          panel(size_t(d_) * QUERIES), tile_panel(KEYS * QUERIES), tile(KEYS * QUERIES),
          sums(size_t(d_) * QUERIES) {}
};

// The tile of scaled scores at `key`; those of keys that are none weigh nothing.
template <class F> void scores(Head<F> &h, const Shape &s, int key) {
    product<F>(&h.k[size_t(key) * h.d_], h.d_, h.panel.data(), QUERIES, h.tile.data(), KEYS, h.d_, false);
    const int valid = std::min<int64_t>(KEYS, s.keys - key);
    for (int p = 0; p < valid * QUERIES; p += LANES) at(&h.tile[p]) *= s.scale;
    std::fill(h.tile.begin() + valid * QUERIES, h.tile.end(), -INFINITY);
}

// One more tile of keys into the running maximum, the sum of weights and the weighted values.
template <class F> void softmax_step(Head<F> &h, float *most, float *total) {
    for (int i = 0; i < QUERIES; i += LANES) {
        Vec top = at(most + i);
        for (int j = 0; j < KEYS; j++) top = larger(top, at(&h.tile[j * QUERIES + i]));
        const Vec shrink = exp_of(at(most + i) - top);
        Vec sum = at(total + i) * shrink;
        for (int j = 0; j < KEYS; j++) {
            Vec &weight = at(&h.tile[j * QUERIES + i]);
            weight = exp_of(weight - top);
            sum += weight;
        }
        at(most + i) = top;
        at(total + i) = sum;
        for (int d = 0; d < h.d_; d++) at(&h.sums[d * QUERIES + i]) *= shrink;
    }
}

template <class F>
void forward_block(Head<F> &h, const Shape &s, const Tokens<F> &q, const Tokens<F> &out, float *lse,
                   int first) {
    alignas(64) float most[QUERIES], total[QUERIES];
    std::fill_n(most, QUERIES, -1e30f);
    std::fill_n(total, QUERIES, 0.0f);
    std::fill(h.sums.begin(), h.sums.end(), 0.0f);
    panel_of_features<F>(h.panel, q, first);
    for (int key = 0; key < s.keys; key += KEYS) {
        scores<F>(h, s, key);
        softmax_step<F>(h, most, total);
        panel_of_tile<F>(h.tile_panel, h.tile.data());
        product<F>(&h.v_columns[key], h.keys_, h.tile_panel.data(), QUERIES, h.sums.data(), h.d_, KEYS,
                   true);
    }
    for (int i = 0; i < std::min<int64_t>(QUERIES, s.queries - first); i++) {
        lse[first + i] = most[i] + std::log(total[i]);
        for (int d = 0; d < s.features; d++)
            out.row(first + i)[d] = F::write(h.sums[d * QUERIES + i] / total[i]);
    }
}

template <class F>
void forward(const Shape &s, void *q, void *k, void *v, void *out, float *lse, const int64_t *strides,
             int threads) {
    const int blocks = (s.queries + QUERIES - 1) / QUERIES;
    const int64_t heads = s.batch * s.heads;
    std::vector<Head<F>> own(threads, Head<F>(s));  // here, since no exception may leave a thread
#pragma omp parallel num_threads(threads)
    {
        Head<F> &h = own[omp_get_thread_num()];
        int64_t last = -1;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < heads * blocks; task++) {
            const int64_t head = task / blocks;
            if (head != last) {
                copy_rows<F>(h.k, head_of<F>(k, strides + 3, head, s, s.keys), 0, s.keys, h.d_);
                copy_columns<F>(h.v_columns, head_of<F>(v, strides + 6, head, s, s.keys), h.keys_);
                last = head;
            }
            forward_block<F>(h, s, head_of<F>(q, strides, head, s, s.queries),
                             head_of<F>(out, strides + 9, head, s, s.queries), lse + head * s.queries,
                             task % blocks * QUERIES);
        }
    }
}

// Backwards: what a thread needs beside that. dk and dv gather over its queries of a head.
template <class F> struct Back {
    Buffer<F> v, k_columns, q_tokens, do_features, do_tokens, rows;
    std::vector<float> slope, dk, dv;
    explicit Back(const Head<F> &h)
        : v(h.k.size()), k_columns(h.k.size()), q_tokens(size_t(QUERIES) * h.width),
          do_features(h.panel.size()), do_tokens(q_tokens.size()), rows(KEYS * QUERIES),
          slope(KEYS * QUERIES), dk(size_t(h.keys_) * h.width), dv(dk.size()) {}
};

// Weights in the tile from their scores, and the slope of the loss by the scores.
template <class F>
void weights_and_slope(Head<F> &h, Back<F> &b, const float *lse, const float *delta, float scale) {
    for (int j = 0; j < KEYS; j++)
        for (int i = 0; i < QUERIES; i += LANES) {
            const int p = j * QUERIES + i;
            const Vec weight = exp_of(at(&h.tile[p]) - at(lse + i));
            at(&h.tile[p]) = weight;
            at(&b.slope[p]) = weight * (at(&b.slope[p]) - at(delta + i)) * scale;
        }
}

template <class F>
void backward_block(Head<F> &h, Back<F> &b, const Shape &s, const Tokens<F> *t, const float *lse,
                    int first) {
    const Tokens<F> &q = t[0], &out = t[3], &dout = t[4], &dq = t[5];
    alignas(64) float lse_here[QUERIES], delta[QUERIES];
    std::fill_n(lse_here, QUERIES, 1e30f);  // queries that are none weigh nothing
    std::fill_n(delta, QUERIES, 0.0f);
    const int valid = std::min<int64_t>(QUERIES, s.queries - first);
    for (int i = 0; i < valid; i++) {
        lse_here[i] = lse[first + i];
        for (int d = 0; d < s.features; d++)
            delta[i] += F::read(out.row(first + i)[d]) * F::read(dout.row(first + i)[d]);
    }
    panel_of_features<F>(h.panel, q, first);
    panel_of_features<F>(b.do_features, dout, first);
    panel_of_tokens<F>(b.q_tokens, q, first, h.width);
    panel_of_tokens<F>(b.do_tokens, dout, first, h.width);
    std::fill(h.sums.begin(), h.sums.end(), 0.0f);
    for (int key = 0; key < s.keys; key += KEYS) {
        scores<F>(h, s, key);
        product<F>(&b.v[size_t(key) * h.d_], h.d_, b.do_features.data(), QUERIES, b.slope.data(), KEYS,
                   h.d_, false);
        weights_and_slope<F>(h, b, lse_here, delta, s.scale);
        rows_of_tile<F>(b.rows, h.tile.data());
        product<F>(b.rows.data(), QUERIES, b.do_tokens.data(), h.width, &b.dv[size_t(key) * h.width],
                   KEYS, QUERIES, true);
        rows_of_tile<F>(b.rows, b.slope.data());
        product<F>(b.rows.data(), QUERIES, b.q_tokens.data(), h.width, &b.dk[size_t(key) * h.width],
                   KEYS, QUERIES, true);
        panel_of_tile<F>(h.tile_panel, b.slope.data());
        product<F>(&b.k_columns[key], h.keys_, h.tile_panel.data(), QUERIES, h.sums.data(), h.d_, KEYS,
                   true);
    }
    for (int i = 0; i < valid; i++)
        for (int d = 0; d < s.features; d++) dq.row(first + i)[d] = F::write(h.sums[d * QUERIES + i]);
}

// The queries of a head are shared out in `parts`, whose dk and dv are added up in their order.
template <class F>
void backward(const Shape &s, void *const *tensors, const float *lse, const int64_t *strides,
              int threads) {
    const int blocks = (s.queries + QUERIES - 1) / QUERIES;
    const int64_t heads = s.batch * s.heads;
    const int parts = std::min<int64_t>(blocks, (threads + heads - 1) / heads);
    std::vector<Head<F>> own(threads, Head<F>(s));
    std::vector<Back<F>> own_back(threads, Back<F>(own[0]));
    const int width = own[0].width;
    const size_t size = size_t(own[0].keys_) * width;
    std::vector<float> gathered(parts > 1 ? 2 * size * heads * parts : 0);
    const auto write = [&](int64_t head, const float *dk, const float *dv) {
        const auto to_k = head_of<F>(tensors[6], strides + 18, head, s, s.keys);
        const auto to_v = head_of<F>(tensors[7], strides + 21, head, s, s.keys);
        for (int j = 0; j < s.keys; j++)
            for (int d = 0; d < s.features; d++) {
                to_k.row(j)[d] = F::write(dk[size_t(j) * width + d]);
                to_v.row(j)[d] = F::write(dv[size_t(j) * width + d]);
            }
    };
#pragma omp parallel num_threads(threads)
    {
        Head<F> &h = own[omp_get_thread_num()];
        Back<F> &b = own_back[omp_get_thread_num()];
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < heads * parts; task++) {
            const int64_t head = task / parts, part = task % parts;
            Tokens<F> t[6];
            for (int i = 0; i < 6; i++)
                t[i] = head_of<F>(tensors[i], strides + 3 * i, head, s,
                                  i == 1 || i == 2 ? s.keys : s.queries);
            copy_rows<F>(h.k, t[1], 0, s.keys, h.d_);
            copy_rows<F>(b.v, t[2], 0, s.keys, h.d_);
            copy_columns<F>(b.k_columns, t[1], h.keys_);
            std::fill(b.dk.begin(), b.dk.end(), 0.0f);
            std::fill(b.dv.begin(), b.dv.end(), 0.0f);
            for (int64_t i = blocks * part / parts; i < blocks * (part + 1) / parts; i++)
                backward_block<F>(h, b, s, t, lse + head * s.queries, i * QUERIES);
            if (parts == 1) {
                write(head, b.dk.data(), b.dv.data());
            } else {
                std::copy(b.dk.begin(), b.dk.end(), &gathered[2 * task * size]);
                std::copy(b.dv.begin(), b.dv.end(), &gathered[(2 * task + 1) * size]);
            }
        }
        if (parts > 1) {
#pragma omp for schedule(static)
            for (int64_t head = 0; head < heads; head++) {
                float *sum = &gathered[2 * head * parts * size];
                for (int part = 1; part < parts; part++)
                    for (size_t i = 0; i < 2 * size; i++) sum[i] += sum[2 * part * size + i];
                write(head, sum, sum + size);
            }
        }
    }
}

template <class Work> int guarded(Work work) {
    try {
        work();
        return 0;
    } catch (const std::bad_alloc &) {
        return 1;
    }
}

}  // namespace

// `size`: batch, heads, queries, keys, features. `strides`: of batch, head and token, a tensor each.
// Both return 0, or 1 where memory ran out.
extern "C" {

int attention_forward(int is_bfloat16, const int64_t *size, float scale, void *const *tensors,
                      float *lse, const int64_t *strides, int threads) {
    const Shape s{size[0], size[1], size[2], size[3], size[4], scale};
    return guarded([&] {
        (is_bfloat16 ? forward<BFloat16> : forward<Float32>)(s, tensors[0], tensors[1], tensors[2],
                                                             tensors[3], lse, strides, threads);
    });
}

int attention_backward(int is_bfloat16, const int64_t *size, float scale, void *const *tensors,
                       const float *lse, const int64_t *strides, int threads) {
    const Shape s{size[0], size[1], size[2], size[3], size[4], scale};
    return guarded([&] {
        (is_bfloat16 ? backward<BFloat16> : backward<Float32>)(s, tensors, lse, strides, threads);
    });
}
}
