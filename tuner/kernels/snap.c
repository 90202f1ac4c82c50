/* Fake-quantization in one pass over memory. Plain C, called by ctypes; built by build.py.
 *
 * Never compile with -ffast-math: the sums that round (see to_float_by_sum) must stay, NaN must
 * stay NaN, and x / s must be a true division.
 */
#include "native.h"

enum { INTEGER = 0, BY_SUM = 1, BY_BITS = 2, CODEBOOK = 3 };
enum { FLOOR = 0, CEIL = 1, RCEIL = 2, EVEN = 3 };

/* FloatCodec in codecs.py says what the fields mean. A codebook has `ends` between its entries:
 * entry k + 1 begins above ends[k]. */
typedef struct {
    int32_t kind, shift, parity, subnormals, negative_zero, saturating;
    float limit, largest, overflow, normal, magic;
    int32_t length;
    const float *entries, *ends;
} codec_t;

/* A tensor as [outer, n, inner], `size` neighbours of n sharing a scale, which lies at
 * outer * so + group * sk + inner * si. */
typedef struct {
    int64_t outer, n, inner, size, so, sk, si;
} layout_t;

/* Rows of `length` values each, `step` apart along three axes of `count` rows. */
typedef struct {
    int64_t count[3], step[3], length;
} rows_t;

typedef struct {
    const float *scale, *inverse; /* null: values are divided by the scale */
    const float *low, *high;      /* these, too, lie as scale does, or are null: */
    float all_low, all_high;      /* then these hold for all values */
} params_t;

enum { STRIP = 64 };                /* short runs that a thread takes at a time */
enum { CACHED = 256 };              /* values that stay in the cache over all entries */
enum { LINE = 64 };                 /* bytes that come into the cache together */
enum { NEAR = 512, AHEAD = 512 };   /* values masked at a time, and fetched before their turn */
enum { STREAMED = 8 << 20 };        /* bytes of a gradient that go past the cache, or more */
enum { TOGETHER = 16 };             /* blocks whose scales are found at once */
enum { BLOCKS = 512 };              /* that a thread takes at a time */
enum { GATHERED = 1024 };           /* values of short rows that are put together first */
enum { ROWS_AHEAD = 16 };           /* short rows fetched before their turn */

/* The comparisons are written so that NaN fails them and stays. */
static inline float to_integer(float v, float low, float high) {
    v = rintf(v);
    v = low > v ? low : v;
    return high < v ? high : v;
}

static inline float finished(float magnitude, float rounded, float v, const codec_t *c) {
    if (!c->saturating) rounded = rounded > c->largest ? c->overflow : rounded;
    if (!c->subnormals) {
        float kept = magnitude > 0.5f * c->normal ? c->normal : 0.0f;
        rounded = magnitude < c->normal ? kept : rounded;
    }
    rounded = float_of(bits_of(rounded) | (bits_of(v) & 0x80000000u));
    return c->negative_zero ? rounded : rounded + 0.0f;
}

static inline float to_float_by_sum(float v, const codec_t *c) {
    float a = fabsf(v);
    a = a > c->limit ? c->limit : a;
    float power = float_of(bits_of(a) & 0x7f800000u);
    power = c->normal > power ? c->normal : power;
    float constant = power * c->magic;
    return finished(a, (a + constant) - constant, v, c);
}

static inline float rounded_bits(float a, const codec_t *c) {
    uint32_t u = bits_of(a);
    uint32_t odd = ((u >> c->shift) ^ (uint32_t)c->parity) & 1;
    u = (u + odd + ((1u << (c->shift - 1)) - 1)) & ~((1u << c->shift) - 1);
    return a != a ? a : float_of(u);
}

static inline float to_float_by_bits(float v, const codec_t *c) {
    float a = fabsf(v);
    a = a > c->limit ? c->limit : a;
    float constant = c->normal * c->magic;
    float rounded = a < 2.0f * c->normal ? (a + constant) - constant : rounded_bits(a, c);
    return finished(a, rounded, v, c);
}

/* With the exponents of fp32 its own subnormals round as the format's do. */
static inline float to_float_like_fp32(float v, const codec_t *c) {
    float a = fabsf(v);
    a = a > c->limit ? c->limit : a;
    return finished(a, rounded_bits(a, c), v, c);
}

/* Replace v[i] by the nearest entry; a tie goes to the lower one. */
static inline void to_entries(float *restrict v, int64_t n, const codec_t *c) {
    float nearest[CACHED];
    for (int64_t i = 0; i < n; i++) nearest[i] = c->entries[0];
    for (int32_t k = 1; k < c->length; k++) {
        const float end = c->ends[k - 1], entry = c->entries[k];
        for (int64_t i = 0; i < n; i++) nearest[i] = v[i] > end ? entry : nearest[i];
    }
    for (int64_t i = 0; i < n; i++) v[i] = v[i] != v[i] ? v[i] : nearest[i];
}

static inline codec_t plain_of(const codec_t *c) {
    codec_t plain = *c;
    plain.subnormals = plain.negative_zero = plain.saturating = 1;
    return plain;
}

/* OCP Microscaling Formats v1.0, section 6.3: the shared scale from the largest magnitude. */
typedef struct {
    int32_t rounding, emax, mantissa, size;
    float largest;
} mx_t;

ALWAYS_INLINE float mx_scale(uint32_t amax, const mx_t *mx, int rounding) {
    const int finite = amax < 0x7f800000u;
    if (rounding == EVEN) amax += 1u << (22 - mx->mantissa);
    if (rounding == RCEIL) amax = bits_of(float_of(amax) / mx->largest);
    int32_t exponent = (int32_t)(amax >> 23) - 127;
    const int is_above = amax < 0x00800000u ? amax > 0x00400000u : (amax & 0x7fffffu) != 0;
    if (rounding == CEIL || rounding == RCEIL) exponent += is_above;
    if (rounding != RCEIL) exponent -= mx->emax;
    exponent = exponent < -127 ? -127 : exponent > 127 ? 127 : exponent;
    const uint32_t bits = exponent == -127 ? 0x00400000u : (uint32_t)(exponent + 127) << 23;
    return finite ? float_of(bits) : NAN;
}

/* The loops below come once a type. In a run of `one` scale it is a constant; in a run of `each`,
 * value i has scale i. `plain` (saturating, with subnormals and −0) tells the compiler to leave
 * the rest out. */
#define LOOP(STATEMENT) for (int64_t i = 0; i < n; i++) { STATEMENT }
#define ROUNDED_LOOP(SCALE, ROUND, LOAD, STORE)                                                    \
    LOOP(const float s = SCALE; const float v = LOAD(x[i]) / s; y[i] = STORE(ROUND * s);)
#define CODEBOOK_LOOP(SCALE, LOAD, STORE)                                                          \
    float v[CACHED];                                                                               \
    for (int64_t from = 0; from < n; from += CACHED) {                                             \
        const int64_t to = from + CACHED < n ? from + CACHED : n;                                  \
        for (int64_t i = from; i < to; i++) v[i - from] = LOAD(x[i]) / SCALE;                      \
        to_entries(v, to - from, c);                                                               \
        for (int64_t i = from; i < to; i++) y[i] = STORE(v[i - from] * SCALE);                     \
    }
#define FLOAT_LOOPS(SCALE, LOAD, STORE)                                                            \
    if (c->kind == BY_SUM && is_plain) { ROUNDED_LOOP(SCALE, to_float_by_sum(v, &plain), LOAD, STORE) } \
    else if (c->kind == BY_SUM) { ROUNDED_LOOP(SCALE, to_float_by_sum(v, &own), LOAD, STORE) }     \
    else if (c->kind == CODEBOOK) { CODEBOOK_LOOP(SCALE, LOAD, STORE) }                            \
    else if (c->normal == 0x1p-126f && is_plain) {                                                 \
        ROUNDED_LOOP(SCALE, to_float_like_fp32(v, &plain), LOAD, STORE)                            \
    }                                                                                              \
    else { ROUNDED_LOOP(SCALE, to_float_by_bits(v, &own), LOAD, STORE) }

#define FUNCTIONS(T, SUFFIX, LOAD, STORE, KEPT)                                                    \
static inline void snap_one_##SUFFIX(const T *restrict x, T *restrict y, int64_t n,                \
                                     const params_t *p, int64_t at, const codec_t *c) {            \
    const float scale = p->scale[at];                                                              \
    const float low = p->low ? p->low[at] : p->all_low;                                            \
    const float high = p->high ? p->high[at] : p->all_high;                                        \
    const int is_plain = c->subnormals && c->negative_zero && c->saturating;                       \
    const codec_t own = *c, plain = plain_of(c);                                                   \
    if (p->inverse) { /* NVFP4: only the numbers of plain floats come so */                        \
        const float inverse = p->inverse[at];                                                      \
        LOOP(y[i] = STORE(to_float_by_sum(LOAD(x[i]) * inverse, &plain) * scale);)                 \
    } else if (c->kind == INTEGER) {                                                               \
        ROUNDED_LOOP(scale, to_integer(v, low, high), LOAD, STORE)                                 \
    }                                                                                              \
    else FLOAT_LOOPS(scale, LOAD, STORE)                                                           \
}                                                                                                  \
static inline void snap_each_##SUFFIX(const T *restrict x, T *restrict y, int64_t n,               \
                                      const params_t *p, int64_t at, const codec_t *c) {           \
    const float *scale = p->scale + at, *lows = p->low ? p->low + at : 0;                          \
    const float *highs = p->high ? p->high + at : 0;                                               \
    const float low = p->all_low, high = p->all_high;                                              \
    const int is_plain = c->subnormals && c->negative_zero && c->saturating;                       \
    const codec_t own = *c, plain = plain_of(c);                                                   \
    if (c->kind == INTEGER && p->low) {                                                            \
        ROUNDED_LOOP(scale[i], to_integer(v, lows[i], highs[i]), LOAD, STORE)                      \
    } else if (c->kind == INTEGER) {                                                               \
        ROUNDED_LOOP(scale[i], to_integer(v, low, high), LOAD, STORE)                              \
    } else FLOAT_LOOPS(scale[i], LOAD, STORE)                                                      \
}                                                                                                  \
/* The gradient passes where low <= x <= high: here the bounds are those of x itself. */           \
static inline void mask_one_##SUFFIX(const T *restrict x, const T *restrict g, T *restrict y,      \
                                     int64_t n, const params_t *p, int64_t at) {                   \
    const float low = p->low ? p->low[at] : p->all_low;                                            \
    const float high = p->high ? p->high[at] : p->all_high;                                        \
    LOOP(const float v = LOAD(x[i]); y[i] = KEPT(g[i], (v >= low) & (v <= high));)                 \
}                                                                                                  \
static inline void mask_each_##SUFFIX(const T *restrict x, const T *restrict g, T *restrict y,     \
                                      int64_t n, const params_t *p, int64_t at) {                  \
    const float *low = p->low + at, *high = p->high + at;                                          \
    LOOP(const float v = LOAD(x[i]); y[i] = KEPT(g[i], (v >= low[i]) & (v <= high[i]));)           \
}                                                                                                  \
ALWAYS_INLINE uint32_t amax_of_##SUFFIX(const T *x, int64_t n) {                                   \
    uint32_t amax = 0;                                                                             \
    LOOP(const uint32_t u = bits_of(LOAD(x[i])) & 0x7fffffffu; amax = u > amax ? u : amax;)        \
    return amax;                                                                                   \
}                                                                                                  \
ALWAYS_INLINE void snap_block_##SUFFIX(const T *restrict x, T *restrict y, int64_t n, float s,     \
                                       float inverse, const codec_t *plain) {                      \
    if (plain->kind == INTEGER) { /* MXINT8 counts in 1/64 */                                      \
        LOOP(y[i] = STORE(to_integer(LOAD(x[i]) * inverse * 64.0f, -127.0f, 127.0f)                \
                          * (s * 0x1p-6f));)                                                       \
    } else {                                                                                       \
        LOOP(y[i] = STORE(to_float_by_sum(LOAD(x[i]) * inverse, plain) * s);)                      \
    }                                                                                              \
}                                                                                                  \
/* The scales of up to TOGETHER blocks of `n` values are found at once. */                         \
ALWAYS_INLINE void snap_together_##SUFFIX(const T *x, T *y, int64_t blocks, int64_t n,             \
                                          const mx_t *mx, int rounding, const codec_t *plain) {    \
    uint32_t amax[TOGETHER];                                                                       \
    float s[TOGETHER], inverse[TOGETHER];                                                          \
    for (int64_t b = 0; b < blocks; b++) amax[b] = amax_of_##SUFFIX(x + b * n, n);                 \
    for (int64_t b = 0; b < blocks; b++) {                                                         \
        s[b] = mx_scale(amax[b], mx, rounding);                                                    \
        inverse[b] = 1.0f / s[b]; /* exact: both are powers of two */                              \
    }                                                                                              \
    for (int64_t b = 0; b < blocks; b++)                                                           \
        snap_block_##SUFFIX(x + b * n, y + b * n, n, s[b], inverse[b], plain);                     \
}                                                                                                  \
/* Bring values into the cache that are read soon: they need not exist. */                         \
ALWAYS_INLINE void prefetch_##SUFFIX(const T *x, int64_t n) {                                      \
    for (int64_t i = 0; i < n; i += LINE / sizeof(T)) PREFETCH(x + i, 0)                           \
}                                                                                                  \
void snap_tensor_##SUFFIX(const T *x, T *y, int64_t n, float scale, float low, float high,         \
                          const codec_t *c) {                                                      \
    const params_t p = {&scale, 0, 0, 0, low, high};                                               \
    SPLIT(snap_one_##SUFFIX(x + from, y + from, count, &p, 0, c))                                  \
}                                                                                                  \
void snap_layout_##SUFFIX(const T *x, T *y, const layout_t *l, const params_t *p,                  \
                          const codec_t *c) {                                                      \
    WALK(snap_one_##SUFFIX(x + from, y + from, count, p, at, c),                                   \
         snap_each_##SUFFIX(x + from, y + from, count, p, at, c))                                  \
}                                                                                                  \
ALWAYS_INLINE void copy_row_##SUFFIX(T *restrict y, const T *restrict x, int64_t n) {              \
    int64_t i = 0;                                                                                 \
    for (; i + 16 <= n; i += 16) memcpy(y + i, x + i, 16 * sizeof(T)); /* no call: of fixed size */ \
    for (; i < n; i++) y[i] = x[i];                                                                \
}                                                                                                  \
void snap_rows_##SUFFIX(const T *x, T *y, const rows_t *r, float scale, float low, float high,     \
                        const codec_t *c) {                                                        \
    const params_t p = {&scale, 0, 0, 0, low, high};                                               \
    const int64_t inner = r->count[2], middle = r->count[1], length = r->length;                   \
    const int64_t total = r->count[0] * middle * inner;                                            \
    const int64_t strip = length < GATHERED ? GATHERED / length : 1;                               \
    PARALLEL_FOR(total * length)                                                                   \
    for (int64_t first = 0; first < total; first += strip) {                                       \
        const int64_t rows = first + strip < total ? strip : total - first;                        \
        int64_t k = first % inner, j = first / inner % middle, i = first / inner / middle;         \
        T gathered[GATHERED];                                                                      \
        const T *source = x + i * r->step[0] + j * r->step[1] + k * r->step[2];                    \
        for (int64_t row = 0; strip > 1 && row < rows; row++) {                                    \
            const T *from = x + i * r->step[0] + j * r->step[1] + k * r->step[2];                  \
            prefetch_##SUFFIX(from + ROWS_AHEAD * r->step[2], length);                         \
            copy_row_##SUFFIX(gathered + row * length, from, length);                              \
            if (++k == inner) { k = 0; if (++j == middle) { j = 0; i++; } }                        \
        }                                                                                          \
        source = strip > 1 ? gathered : source;                                                    \
        snap_one_##SUFFIX(source, y + first * length, rows * length, &p, 0, c);                    \
    }                                                                                              \
}                                                                                                  \
ALWAYS_INLINE void mask_ahead_##SUFFIX(const T *x, const T *g, T *y, int64_t n, const params_t *p) { \
    for (int64_t from = 0; from < n; from += NEAR) {                                               \
        const int64_t count = n - from < NEAR ? n - from : NEAR;                                   \
        prefetch_##SUFFIX(x + from + AHEAD, count);                                                \
        prefetch_##SUFFIX(g + from + AHEAD, count);                                                \
        mask_one_##SUFFIX(x + from, g + from, y + from, count, p, 0);                              \
    }                                                                                              \
}                                                                                                  \
ALWAYS_INLINE void mask_streamed_##SUFFIX(const T *x, const T *g, T *y, int64_t n,                 \
                                          const params_t *p) {                                     \
    T near[NEAR];                                                                                  \
    for (int64_t from = 0; from < n; from += NEAR) {                                               \
        const int64_t count = n - from < NEAR ? n - from : NEAR;                                   \
        mask_one_##SUFFIX(x + from, g + from, near, count, p, 0);                                  \
        stream(y + from, near, count * sizeof(T));                                                 \
    }                                                                                              \
    end_stream();                                                                                  \
}                                                                                                  \
void mask_tensor_##SUFFIX(const T *x, const T *g, T *y, int64_t n, float low, float high) {        \
    const params_t p = {0, 0, 0, 0, low, high};                                                    \
    if (n * (int64_t)sizeof(T) >= STREAMED) {                                                      \
        SPLIT(mask_streamed_##SUFFIX(x + from, g + from, y + from, count, &p))                     \
    } else {                                                                                       \
        SPLIT(mask_ahead_##SUFFIX(x + from, g + from, y + from, count, &p))                        \
    }                                                                                              \
}                                                                                                  \
void mask_layout_##SUFFIX(const T *x, const T *g, T *y, const layout_t *l, const params_t *p) {    \
    WALK(mask_one_##SUFFIX(x + from, g + from, y + from, count, p, at),                            \
         mask_each_##SUFFIX(x + from, g + from, y + from, count, p, at))                           \
}                                                                                                  \
void amax_blocks_##SUFFIX(const T *x, float *y, int64_t rows, int64_t n, int64_t size) {           \
    const int64_t blocks = (n + size - 1) / size;                                                  \
    PARALLEL_FOR(rows * n)                                                                         \
    for (int64_t row = 0; row < rows; row++) {                                                     \
        for (int64_t b = 0; b < blocks; b++) {                                                     \
            const T *first = x + row * n + b * size;                                               \
            const int64_t count = n - b * size < size ? n - b * size : size;                       \
            const uint32_t amax = count == 16 ? amax_of_##SUFFIX(first, 16)                        \
                                              : amax_of_##SUFFIX(first, count);                    \
            y[row * blocks + b] = float_of(amax);                                                  \
        }                                                                                          \
    }                                                                                              \
}                                                                                                  \
ALWAYS_INLINE void snap_blocks_##SUFFIX(const T *x, T *y, int64_t n, int64_t size, const mx_t *mx, \
                                        int rounding, const codec_t *plain) {                      \
    const int64_t strip = TOGETHER * size;                                                         \
    int64_t from = 0;                                                                              \
    for (; from + strip <= n; from += strip) {                                                     \
        prefetch_##SUFFIX(x + from + strip, strip);                                                \
        snap_together_##SUFFIX(x + from, y + from, TOGETHER, size, mx, rounding, plain);           \
    }                                                                                              \
    const int64_t blocks = (n - from) / size, last = from + blocks * size;                         \
    snap_together_##SUFFIX(x + from, y + from, blocks, size, mx, rounding, plain);                 \
    if (last < n) snap_together_##SUFFIX(x + last, y + last, 1, n - last, mx, rounding, plain);    \
}                                                                                                  \
void snap_mx_##SUFFIX(const T *x, T *y, int64_t rows, int64_t n, const mx_t *mx,                   \
                      const codec_t *c) {                                                          \
    const int64_t total = rows * n;                                                                \
    const int64_t size = n && n < mx->size ? n : mx->size; /* a shorter row is one whole block */  \
    const int64_t length = n % size ? n : BLOCKS * size;   /* whole blocks know no rows */         \
    PARALLEL_FOR(total)                                                                            \
    for (int64_t from = 0; from < total; from += length) {                                         \
        const int64_t count = from + length < total ? length : total - from;                       \
        const codec_t plain = plain_of(c);                                                         \
        /* what is mostly asked for, as constants: much falls away */                              \
        if (mx->rounding == FLOOR && size == 32)                                                   \
            snap_blocks_##SUFFIX(x + from, y + from, count, 32, mx, FLOOR, &plain);                \
        else snap_blocks_##SUFFIX(x + from, y + from, count, size, mx, mx->rounding, &plain);      \
    }                                                                                              \
}

/* Cut one long run into pieces that threads share. */
#define SPLIT(CALL)                                                                                \
    const int64_t piece = 1 << 14;                                                                 \
    PARALLEL_FOR(n)                                                                                \
    for (int64_t from = 0; from < n; from += piece) {                                              \
        const int64_t count = n - from < piece ? n - from : piece;                                 \
        CALL;                                                                                      \
    }

/* Walk over the runs of a layout. */
#define WALK(ONE, EACH)                                                                            \
    const int64_t groups = (l->n + l->size - 1) / l->size, total = l->outer * groups;              \
    const int64_t pace = l->size * l->inner > STRIP * STRIP ? 1 : STRIP;                           \
    PARALLEL_FOR(l->outer * l->n * l->inner)                                                       \
    for (int64_t strip = 0; strip < total; strip += pace) {                                        \
        int64_t o = strip / groups, j = strip % groups;                                            \
        const int64_t end = strip + pace < total ? strip + pace : total;                           \
        for (int64_t pair = strip; pair < end; pair++) {                                           \
            const int64_t begin = j * l->size;                                                     \
            const int64_t length = l->n - begin < l->size ? l->n - begin : l->size;                \
            const int64_t at = o * l->so + j * l->sk;                                              \
            int64_t from = (o * l->n + begin) * l->inner;                                          \
            if (!l->si) {                                                                          \
                const int64_t count = length * l->inner;                                           \
                ONE;                                                                               \
            } else {                                                                               \
                const int64_t count = l->inner;                                                    \
                for (int64_t k = 0; k < length; k++, from += count) { EACH; }                      \
            }                                                                                      \
            if (++j == groups) { j = 0; o++; }                                                     \
        }                                                                                          \
    }

FUNCTIONS(float, f32, same, same, kept)
FUNCTIONS(bf16, bf16, from_bf16, to_bf16, kept_bf16)
#ifdef __FLT16_MAX__
FUNCTIONS(fp16, f16, from_fp16, to_fp16, kept_fp16)
#endif
