// C (M, N) fp32 (+)= A (M, K) @ B (K, N) of bf16 matrices, for processors with AVX512-BF16.
//
// Products of bf16 numbers are exact in fp32, sums are fp32: of DEPTH terms in a register, then over those blocks. Tiles
// of C are handed out to threads; each packs its part of A and B so that one 32-bit lane holds two neighbours along K.
// No sum depends on the number of threads.

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

// Element (line, k) of an operand lies at data[line * line_stride + k * k_stride]; one of the strides is 1. Lines are
// the rows of A and the columns of B.
typedef struct {
    const uint16_t *data;
    int64_t line_stride, k_stride;
} Operand;

typedef struct {
    int64_t M, N, K;
    Operand a, b;
    float *c;
    int64_t c_stride;
    int32_t add;
} Product;

#ifdef __AVX512BF16__
#include <immintrin.h>

enum { ROWS = 6, COLUMNS = 64, DEPTH = 256, MOST_ROWS = 192, MOST_COLUMNS = 256 };

// Kept by a thread for as long as it lives: 224 KB.
static _Thread_local _Alignas(64) int32_t packed_a[MOST_ROWS * DEPTH / 2], packed_b[MOST_COLUMNS * DEPTH / 2];

static int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

// 16 lines of 16 pairs each: dword (line, pair) goes to out[pair * width + line].
static void transposed(const uint16_t *in, int64_t stride, int32_t *out, int64_t width) {
    __m512i x[16], y[16];
    for (int i = 0; i < 16; i++) x[i] = _mm512_loadu_si512(in + i * stride);
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
            x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
        }
    // x[4 g + c]: in its four lanes the pairs c, c + 4, c + 8, c + 12 of the lines 4 g to 4 g + 3
    for (int c = 0; c < 4; c++) {
        const __m512i even = _mm512_shuffle_i32x4(x[c], x[4 + c], 0x88), odd = _mm512_shuffle_i32x4(x[c], x[4 + c], 0xdd);
        const __m512i even8 = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0x88);
        const __m512i odd8 = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0xdd);
        _mm512_storeu_si512(out + c * width, _mm512_shuffle_i32x4(even, even8, 0x88));
        _mm512_storeu_si512(out + (c + 4) * width, _mm512_shuffle_i32x4(odd, odd8, 0x88));
        _mm512_storeu_si512(out + (c + 8) * width, _mm512_shuffle_i32x4(even, even8, 0xdd));
        _mm512_storeu_si512(out + (c + 12) * width, _mm512_shuffle_i32x4(odd, odd8, 0xdd));
    }
}

static int32_t pair(const Operand *x, int64_t line, int64_t k, int64_t K) {
    const uint16_t *at = x->data + line * x->line_stride + k * x->k_stride;
    return (int32_t)(at[0] | (k + 1 < K ? (uint32_t)at[x->k_stride] << 16 : 0));
}

// Lines [line, line + lines) and [k, k + depth) of an operand as panels of `width` lines: out[(k / 2) * width + line],
// zeros where a panel has no line and at an odd end.
static void pack(const Operand *x, int64_t line, int64_t lines, int64_t k, int64_t depth, int64_t width, int32_t *out) {
    const int64_t pairs = (depth + 1) / 2, K = k + depth;
    for (int64_t first = 0; first < lines; first += width, out += pairs * width) {
        const int64_t count = least(width, lines - first);
        if (count < width) memset(out, 0, (size_t)(pairs * width) * sizeof *out);
        if (x->k_stride == 1) {
            for (int64_t l = 0; l < count;) {
                int64_t p = 0, step = l + 16 <= count ? 16 : 1;
                const uint16_t *at = x->data + (line + first + l) * x->line_stride + k;
                if (step == 16)
                    for (; 2 * (p + 16) <= depth; p += 16)
                        transposed(at + 2 * p, x->line_stride, out + p * width + l, width);
                else
                    for (; 2 * (p + 1) <= depth; p++) memcpy(out + p * width + l, at + 2 * p, 4);
                for (; p < pairs; p++)
                    for (int64_t i = 0; i < step; i++)
                        out[p * width + l + i] = pair(x, line + first + l + i, k + 2 * p, K);
                l += step;
            }
            continue;
        }
        for (int64_t p = 0; p < depth / 2; p++) {
            const uint16_t *low = x->data + (k + 2 * p) * x->k_stride + (line + first) * x->line_stride;
            const uint16_t *high = low + x->k_stride;
            int32_t *to = out + p * width;
            for (int64_t l = 0; l < count; l += 16) {
                const __mmask16 mask = (__mmask16)((1u << least(16, count - l)) - 1);
                const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, low + l));
                const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, high + l));
                _mm512_mask_storeu_epi32(to + l, mask, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
            }
        }
        if (depth % 2)
            for (int64_t l = 0; l < count; l++)
                out[depth / 2 * width + l] = pair(x, line + first + l, K - 1, K);
    }
}

static void small_tile(const int32_t *a, const int32_t *b, int64_t pairs, float *c, int64_t stride, int64_t rows,
                       int64_t columns, int add) {
    __m512 sum[ROWS][4];
#pragma GCC unroll 6
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sum[m][j] = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++, a += ROWS, b += COLUMNS) {
        __m512bh right[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) right[j] = (__m512bh)_mm512_loadu_si512(b + 16 * j);
#pragma GCC unroll 6
        for (int m = 0; m < ROWS; m++) {
            const __m512bh left = (__m512bh)_mm512_set1_epi32(a[m]);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sum[m][j] = _mm512_dpbf16_ps(sum[m][j], left, right[j]);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < ROWS; m++) {
        if (m >= rows) break;
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const int64_t left = columns - 16 * j;
            const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
            float *at = c + m * stride + 16 * j;
            const __m512 before = add ? _mm512_maskz_loadu_ps(mask, at) : _mm512_setzero_ps();
            _mm512_mask_storeu_ps(at, mask, _mm512_add_ps(before, sum[m][j]));
        }
    }
}

static void large_tile(const Product *x, int64_t m, int64_t rows, int64_t n, int64_t columns) {
    int32_t *a = packed_a, *b = packed_b;
    for (int64_t k = 0; k < x->K; k += DEPTH) {
        const int64_t depth = least(DEPTH, x->K - k), pairs = (depth + 1) / 2;
        pack(&x->a, m, rows, k, depth, ROWS, a);
        pack(&x->b, n, columns, k, depth, COLUMNS, b);
        for (int64_t j = 0; j < columns; j += COLUMNS)
            for (int64_t i = 0; i < rows; i += ROWS)
                small_tile(a + i * pairs, b + j * pairs, pairs, x->c + (m + i) * x->c_stride + n + j, x->c_stride,
                           least(ROWS, rows - i), least(COLUMNS, columns - j), x->add || k);
    }
}

typedef struct {
    const Product *product;
    int64_t rows, columns, across, tiles;
    atomic_llong next_tile;
} Tiles;

static void work_on_tiles(void *shared) {
    Tiles *work = shared;
    const Product *x = work->product;
    for (int64_t tile; (tile = atomic_fetch_add(&work->next_tile, 1)) < work->tiles;) {
        const int64_t m = tile / work->across * work->rows, n = tile % work->across * work->columns;
        large_tile(x, m, least(work->rows, x->M - m), n, least(work->columns, x->N - n));
    }
}

// Whether this processor has such a product.
int fkd_has_gemm(void) { return 1; }

void fkd_gemm(const Product *x, void (*parallel)(void (*)(void *), void *, unsigned, unsigned), unsigned threads) {
    Tiles work = {.product = x, .rows = MOST_ROWS, .columns = MOST_COLUMNS};
    for (;;) {
        work.across = (x->N + work.columns - 1) / work.columns;
        work.tiles = (x->M + work.rows - 1) / work.rows * work.across;
        if (threads == 1 || work.tiles >= 4 * (int64_t)threads || work.columns == COLUMNS) break;
        work.rows /= 2, work.columns /= 2;
    }
    if (threads > 1)
        parallel(work_on_tiles, &work, threads, 0);
    else
        work_on_tiles(&work);
}

#else
int fkd_has_gemm(void) { return 0; }
void fkd_gemm(const Product *x, void (*parallel)(void (*)(void *), void *, unsigned, unsigned), unsigned threads) {
    (void)x, (void)parallel, (void)threads;
}
#endif
