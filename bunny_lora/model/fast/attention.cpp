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

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;
#else
constexpr int LANES = 8, ROWS = 4;
#endif
constexpr int COLUMNS = 3;  // vectors; ROWS x COLUMNS sums are held in registers
constexpr int QUERIES = 2 * COLUMNS * LANES, KEYS = 128;

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef int32_t Int __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

int round_up(int n, int to) { return (n + to - 1) / to * to; }

Vec &at(float *p) { return *reinterpret_cast<Vec *>(p); }
const Vec &at(const float *p) { return *reinterpret_cast<const Vec *>(p); }
Vec spread(float x) { return x - Vec{}; }
// The larger one; b where either is no number.
#if defined(__AVX512F__)
Vec larger(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
bool any(Int mask) { return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask); }
#else
Vec larger(Vec a, Vec b) { return a > b ? a : b; }
bool any(Int mask) {
    int found = 0;
    for (int l = 0; l < LANES; l++) found |= mask[l];
    return found;
}
#endif

// 2^x, never below 2^-125. The polynomials have the least largest error on [-1/2, 1/2]: 7.5e-8 of 2^x,
// or 2.6e-6, which is a thousandth of what bfloat16 rounds off.
template <bool EXACT> Vec exp2_of(Vec x) {
    const float whole = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers
    x = larger(spread(-125.0f), x);
    const Vec shifted = x + whole;
    const Vec r = x - (shifted - whole);
    Vec p;
    if (EXACT) {
        p = r * 1.32764722e-3f + 9.67554162e-3f;
        p = p * r + 5.55071328e-2f;
        p = p * r + 2.40221197e-1f;
        p = p * r + 6.93146967e-1f;
        p = p * r + 1.00000007f;
    } else {
        p = r * 9.57010211e-3f + 5.59178628e-2f;
        p = p * r + 2.40247448e-1f;
        p = p * r + 6.93121814e-1f;
        p = p * r + 9.99999261e-1f;
    }
    const Int result = (Int)p + ((Int)shifted << 23);  // into the exponent
    return (Vec)result;
}

// How numbers lie in memory, and what a step of a product is. A row holds numbers one after the other.
// A panel holds UNIT rows interleaved, so that a vector has UNIT numbers of each column.

struct Float32 {
    typedef float Number;
    static constexpr int UNIT = 1;
    static constexpr bool EXACT = true;
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
    static constexpr bool EXACT = false;
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
#if defined(__AVX512BF16__)
    static void pack(Number *panel, const Vec *rows) {
        static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        const auto both = _mm512_cvtne2ps_pbh((__m512)rows[1], (__m512)rows[0]);
        _mm512_storeu_si512(panel, _mm512_permutexvar_epi16(_mm512_loadu_si512(order), (__m512i)both));
    }
    static void pack_row(Number *row, Vec x) {
        _mm256_storeu_si256((__m256i *)row, (__m256i)_mm512_cvtneps_pbh((__m512)x));
    }
#else
    static Bits rounded(Vec x) {  // to the nearest, in the upper half
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
#endif
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

// A panel of depth D_ and a column for each of QUERIES tokens; `from` is read in units
template <class F> void panel_of_features(Buffer<F> &to, const Tokens<F> &from, int first) {
    std::fill(to.begin(), to.end(), 0);
    const int whole = from.features / F::UNIT * F::UNIT;
    for (int i = 0; i < std::min(QUERIES, from.count - first); i++) {
        const auto *row = from.row(first + i);
        auto *column = &to[size_t(i) * F::UNIT];
        for (int d = 0; d < whole; d += F::UNIT)
            std::copy_n(row + d, F::UNIT, column + size_t(d) * QUERIES);
        if (whole < from.features) column[size_t(whole) * QUERIES] = row[whole];
    }
}

// A panel of depth QUERIES and a column for each of `width` features
template <class F>
void panel_of_tokens(Buffer<F> &to, const Tokens<F> &from, int first, int width) {
    std::fill(to.begin(), to.end(), 0);
    for (int i = 0; i < std::min(QUERIES, from.count - first); i++)
        for (int d = 0; d < from.features; d++)
            to[(size_t(i) / F::UNIT * width + d) * F::UNIT + i % F::UNIT] = from.row(first + i)[d];
}

constexpr float LOG2_E = 1.44269504f;

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

// The tile of scores at `key`; those of keys that are none weigh nothing.
template <class F> void scores(Head<F> &h, const Shape &s, int key) {
    product<F>(&h.k[size_t(key) * h.d_], h.d_, h.panel.data(), QUERIES, h.tile.data(), KEYS, h.d_, false);
    const int valid = std::min<int64_t>(KEYS, s.keys - key);
    std::fill(h.tile.begin() + valid * QUERIES, h.tile.end(), -INFINITY);
}

// Weights are powers of 2 relative to `most`, which follows the largest score only where that has
// become 2^SLACK times as heavy: whatever it is, it falls out in the end.
constexpr float SLACK = 8;

template <class F> void follow_largest(Head<F> &h, float log2_scale, float *most, float *total) {
    Vec top[QUERIES / LANES];
    for (int i = 0; i < QUERIES; i += LANES) top[i / LANES] = at(&h.tile[i]);
    for (int j = 1; j < KEYS; j++)
        for (int i = 0; i < QUERIES; i += LANES)
            top[i / LANES] = larger(top[i / LANES], at(&h.tile[j * QUERIES + i]));
    for (int i = 0; i < QUERIES; i += LANES) {
        const Vec here = top[i / LANES] * log2_scale, before = at(most + i);
        if (!any(here > before + SLACK)) continue;
        at(most + i) = larger(here, before);
        const Vec shrink = exp2_of<true>(before - at(most + i));
        at(total + i) *= shrink;
        for (int d = 0; d < h.d_; d++) at(&h.sums[d * QUERIES + i]) *= shrink;
    }
}

// One more tile of keys into the sum of weights, and the weights as a panel of depth KEYS.
template <class F> void softmax_step(Head<F> &h, float log2_scale, float *most, float *total) {
    follow_largest<F>(h, log2_scale, most, total);
    for (int i = 0; i < QUERIES; i += LANES) {
        const Vec reference = at(most + i);
        Vec sum = at(total + i);
        for (int j = 0; j < KEYS; j += F::UNIT) {
            Vec weights[F::UNIT];
            for (int u = 0; u < F::UNIT; u++) {
                const Vec score = at(&h.tile[(j + u) * QUERIES + i]);
                weights[u] = exp2_of<F::EXACT>(score * log2_scale - reference);
                sum += weights[u];
            }
            F::pack(&h.tile_panel[size_t(j) * QUERIES + i * F::UNIT], weights);
        }
        at(total + i) = sum;
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
        softmax_step<F>(h, s.scale * LOG2_E, most, total);
        product<F>(&h.v_columns[key], h.keys_, h.tile_panel.data(), QUERIES, h.sums.data(), h.d_, KEYS,
                   true);
    }
    for (int i = 0; i < std::min<int64_t>(QUERIES, s.queries - first); i++) {
        lse[first + i] = most[i] + std::log2(total[i]);
        const float share = 1 / total[i];
        for (int d = 0; d < s.features; d++)
            out.row(first + i)[d] = F::write(h.sums[d * QUERIES + i] * share);
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
    Buffer<F> v, k_columns, q_tokens, do_features, do_tokens, weight_rows, slope_rows;
    std::vector<float> slope, dk, dv;
    explicit Back(const Head<F> &h)
        : v(h.k.size()), k_columns(h.k.size()), q_tokens(size_t(QUERIES) * h.width),
          do_features(h.panel.size()), do_tokens(q_tokens.size()), weight_rows(KEYS * QUERIES),
          slope_rows(KEYS * QUERIES),
          slope(KEYS * QUERIES), dk(size_t(h.keys_) * h.width), dv(dk.size()) {}
};

// From the scores in the tile and the slope of the loss by the weights: weights and slope by the scores
// as rows, and the latter as a panel of depth KEYS too.
template <class F>
void weights_and_slope(Head<F> &h, Back<F> &b, const float *lse, const float *delta, float log2_scale) {
    for (int i = 0; i < QUERIES; i += LANES) {
        const Vec lse_here = at(lse + i), delta_here = at(delta + i);
        for (int j = 0; j < KEYS; j += F::UNIT) {
            Vec slopes[F::UNIT];
            for (int u = 0; u < F::UNIT; u++) {
                const int p = (j + u) * QUERIES + i;
                const Vec weight = exp2_of<F::EXACT>(at(&h.tile[p]) * log2_scale - lse_here);
                slopes[u] = weight * (at(&b.slope[p]) - delta_here);
                F::pack_row(&b.weight_rows[p], weight);
                F::pack_row(&b.slope_rows[p], slopes[u]);
            }
            F::pack(&h.tile_panel[size_t(j) * QUERIES + i * F::UNIT], slopes);
        }
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
        weights_and_slope<F>(h, b, lse_here, delta, s.scale * LOG2_E);
        product<F>(b.weight_rows.data(), QUERIES, b.do_tokens.data(), h.width,
                   &b.dv[size_t(key) * h.width], KEYS, QUERIES, true);
        product<F>(b.slope_rows.data(), QUERIES, b.q_tokens.data(), h.width,
                   &b.dk[size_t(key) * h.width], KEYS, QUERIES, true);
        product<F>(&b.k_columns[key], h.keys_, h.tile_panel.data(), QUERIES, h.sums.data(), h.d_, KEYS,
                   true);
    }
    for (int i = 0; i < valid; i++)
        for (int d = 0; d < s.features; d++) dq.row(first + i)[d] = F::write(s.scale * h.sums[d * QUERIES + i]);
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
                to_k.row(j)[d] = F::write(s.scale * dk[size_t(j) * width + d]);
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
