/* What one calibration pass keeps of a tensor, in one pass over memory; see tuner/statistics.py. */
#include "native.h"

enum { BINS = 4096, HALF = BINS / 2, CHUNK = 4096, PART = 256 };

/* `exponent` is that of the histogram, which reaches over ±2^exponent. */
typedef struct {
    double total, total_abs, total_squared;
    int64_t count, zeros, nonfinite;
    int32_t exponent;
    float low, high;
} summary_t;

typedef struct {
    summary_t s;
    uint32_t counts[2][BINS]; /* two, so that equal neighbours do not wait for each other */
} state_t;

static const int32_t SMALLEST_EXPONENT = -1000, MOST_STEPS = 13, SAFE_EXPONENT = 60;

/* Merge pairs of bins until the histogram reaches over ±2^exponent. */
static void grow(uint32_t *counts, int32_t from, int32_t to) {
    const int32_t steps = to - from < MOST_STEPS ? to - from : MOST_STEPS;
    uint32_t grown[BINS] = {0};
    for (int i = 0; i < BINS; i++) grown[((i - HALF) >> steps) + HALF] += counts[i];
    memcpy(counts, grown, sizeof grown);
}

/* Return the smallest exponent with amax < 2^exponent. */
static int32_t exponent_above(uint32_t amax) {
    int exponent;
    if (!amax) return SMALLEST_EXPONENT;
    frexpf(float_of(amax), &exponent);
    return exponent;
}

static void add_sums(summary_t *s, const float *x, int64_t n, int is_safe) {
    for (int64_t start = 0; start < n; start += PART) {
        const int64_t end = start + PART < n ? start + PART : n;
        if (is_safe) {
            float total = 0, total_abs = 0, total_squared = 0;
            PRAGMA(omp simd reduction(+ : total, total_abs, total_squared))
            for (int64_t i = start; i < end; i++) {
                total += x[i];
                total_abs += fabsf(x[i]);
                total_squared += x[i] * x[i];
            }
            s->total += total;
            s->total_abs += total_abs;
            s->total_squared += total_squared;
        } else { /* squares would leave fp32 */
            for (int64_t i = start; i < end; i++) {
                const double v = x[i];
                s->total += v;
                s->total_abs += fabs(v);
                s->total_squared += v * v;
            }
        }
    }
}

static void count_bins(state_t *state, const float *x, int64_t n, int is_safe) {
    int32_t bins[CHUNK];
    const int32_t exponent = state->s.exponent;
    if (is_safe) {
        const float per_unit = (float)ldexp(HALF, -exponent);
        for (int64_t i = 0; i < n; i++) bins[i] = (int32_t)floorf(x[i] * per_unit) + HALF;
    } else {
        const double per_unit = ldexp(HALF, -exponent);
        for (int64_t i = 0; i < n; i++) bins[i] = (int32_t)floor(x[i] * per_unit) + HALF;
    }
    int64_t i = 0;
    for (; i + 1 < n; i += 2) {
        state->counts[0][bins[i]]++;
        state->counts[1][bins[i + 1]]++;
    }
    if (i < n) state->counts[0][bins[i]]++;
}

/* Add up to CHUNK finite values, whose largest magnitude has the bits `amax`. */
static void add_finite(state_t *state, const float *x, int64_t n, uint32_t amax) {
    summary_t *s = &state->s;
    float low = s->low, high = s->high;
    int64_t nonzero = 0;
    PRAGMA(omp simd reduction(min : low) reduction(max : high) reduction(+ : nonzero))
    for (int64_t i = 0; i < n; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        nonzero += x[i] != 0.0f;
    }
    s->low = low;
    s->high = high;
    s->count += n;
    s->zeros += n - nonzero;
    const int32_t above = exponent_above(amax);
    if (above > s->exponent) {
        for (int k = 0; k < 2; k++) grow(state->counts[k], s->exponent, above);
        s->exponent = above;
    }
    const int is_safe = -SAFE_EXPONENT <= s->exponent && s->exponent < SAFE_EXPONENT;
    if (amax || s->exponent > SMALLEST_EXPONENT) count_bins(state, x, n, is_safe);
    else state->counts[0][HALF] += (uint32_t)n;
    add_sums(s, x, n, is_safe);
}

static void add_chunk(state_t *state, const float *x, int64_t n) {
    uint32_t amax = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t u = bits_of(x[i]) & 0x7fffffffu;
        amax = u > amax ? u : amax;
    }
    if (amax < 0x7f800000u) {
        add_finite(state, x, n, amax);
        return;
    }
    float finite[CHUNK];
    int64_t kept = 0;
    amax = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t u = bits_of(x[i]) & 0x7fffffffu;
        if (u < 0x7f800000u) {
            finite[kept++] = x[i];
            amax = u > amax ? u : amax;
        }
    }
    state->s.nonfinite += n - kept;
    if (kept) add_finite(state, finite, kept, amax);
}

static void merge(summary_t *all, int64_t *counts, state_t *state) {
    summary_t *s = &state->s;
    const int32_t exponent = s->exponent > all->exponent ? s->exponent : all->exponent;
    if (exponent > all->exponent) {
        const int32_t steps = exponent - all->exponent;
        int64_t grown[BINS] = {0};
        for (int i = 0; i < BINS; i++)
            grown[((i - HALF) >> (steps < MOST_STEPS ? steps : MOST_STEPS)) + HALF] += counts[i];
        memcpy(counts, grown, sizeof grown);
    }
    for (int k = 0; k < 2; k++) {
        if (exponent > s->exponent) grow(state->counts[k], s->exponent, exponent);
        for (int i = 0; i < BINS; i++) counts[i] += state->counts[k][i];
    }
    all->exponent = exponent;
    all->low = s->low < all->low ? s->low : all->low;
    all->high = s->high > all->high ? s->high : all->high;
    all->count += s->count;
    all->zeros += s->zeros;
    all->nonfinite += s->nonfinite;
    all->total += s->total;
    all->total_abs += s->total_abs;
    all->total_squared += s->total_squared;
}

static summary_t empty(void) {
    summary_t s = {0};
    s.exponent = SMALLEST_EXPONENT;
    s.low = INFINITY;
    s.high = -INFINITY;
    return s;
}

int64_t state_bytes(void) { return sizeof(state_t); }

/* `states` (one a piece) and `counts` hold zeros; n is below 2^32, so that no bin overflows. The
 * pieces are merged in order: the sums do not depend on how many threads there are. */
#define SUMMARIZE(T, SUFFIX)                                                                       \
void summarize_##SUFFIX(const T *x, int64_t n, int64_t pieces, state_t *states, summary_t *all,    \
                        int64_t *counts) {                                                         \
    const int64_t chunks = (n + CHUNK - 1) / CHUNK, share = (chunks + pieces - 1) / pieces;        \
    PARALLEL_FOR(n)                                                                                \
    for (int64_t p = 0; p < pieces; p++) {                                                         \
        state_t *state = states + p;                                                               \
        state->s = empty();                                                                        \
        const int64_t stop = (p + 1) * share * CHUNK < n ? (p + 1) * share * CHUNK : n;            \
        for (int64_t start = p * share * CHUNK; start < stop; start += CHUNK) {                    \
            const int64_t count = stop - start < CHUNK ? stop - start : CHUNK;                     \
            float chunk[CHUNK];                                                                    \
            add_chunk(state, floats_of_##SUFFIX(x + start, count, chunk), count);                  \
        }                                                                                          \
    }                                                                                              \
    *all = empty();                                                                                \
    for (int64_t p = 0; p < pieces; p++) merge(all, counts, states + p);                           \
}

static inline const float *floats_of_f32(const float *x, int64_t n, float *chunk) {
    (void)n, (void)chunk;
    return x;
}
SUMMARIZE(float, f32)

static inline const float *floats_of_bf16(const bf16 *x, int64_t n, float *chunk) {
    for (int64_t i = 0; i < n; i++) chunk[i] = from_bf16(x[i]);
    return chunk;
}
SUMMARIZE(bf16, bf16)

#ifdef __FLT16_MAX__
static inline const float *floats_of_f16(const fp16 *x, int64_t n, float *chunk) {
    for (int64_t i = 0; i < n; i++) chunk[i] = from_fp16(x[i]);
    return chunk;
}
SUMMARIZE(fp16, f16)
#endif
