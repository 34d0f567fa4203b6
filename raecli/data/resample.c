/* Pillow's 8-bit resampling over a window of its output, equal to the bit: coefficients of 22 bits, two passes, the
   first one rounded to 8 bits too. Compiled by data/resample.py, which makes the coefficients. */

#include <stdint.h>
#include <stdlib.h>

#define BITS 22
#define ROWS 16 /* rows that a strip has: a column of a strip is ROWS * 3 lanes that lie together */
#define LANES (ROWS * 3)

#if defined(__x86_64__) && defined(__linux__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

static inline uint8_t clip8(int32_t sum) {
    int32_t value = sum >> BITS;
    return value < 0 ? 0 : value > 255 ? 255 : value;
}

/* out[i] = sum over taps of weights[t] * in[t * stride + i], for i below count */
FOR_EACH_PROCESSOR
static void weigh(const uint8_t *in, long stride, int taps, const int32_t *weights, long count, uint8_t *out) {
    for (long start = 0; start < count; start += LANES) {
        long lanes = count - start < LANES ? count - start : LANES;
        int32_t sum[LANES];
        for (int i = 0; i < LANES; i++) sum[i] = 1 << (BITS - 1);
        for (int t = 0; t < taps; t++) {
            const uint8_t *row = in + t * stride + start;
            int32_t weight = weights[t];
            if (lanes == LANES)
                for (int i = 0; i < LANES; i++) sum[i] += weight * row[i];
            else
                for (int i = 0; i < lanes; i++) sum[i] += weight * row[i];
        }
        if (lanes == LANES)
            for (int i = 0; i < LANES; i++) out[start + i] = clip8(sum[i]);
        else
            for (int i = 0; i < lanes; i++) out[start + i] = clip8(sum[i]);
    }
}

/* in: rows [high] of width `wide`, RGB; out: [high][count], RGB. first, taps: of each output column; weights: [count][room] */
static int across(const uint8_t *in, long wide, long high, long count, const int32_t *first, const int32_t *taps,
                  const int32_t *weights, long room, uint8_t *out) {
    long left = first[0], right = 0;
    for (long x = 0; x < count; x++)
        if (first[x] + taps[x] > right) right = first[x] + taps[x];
    uint8_t *strip = malloc((right - left) * LANES), made[LANES];
    if (!strip) return -1;
    for (long top = 0; top < high; top += ROWS) {
        long rows = high - top < ROWS ? high - top : ROWS;
        for (long r = 0; r < ROWS; r++) {
            const uint8_t *from = in + ((top + (r < rows ? r : 0)) * wide + left) * 3;
            uint8_t *to = strip + r * 3;
            for (long x = left; x < right; x++, from += 3, to += LANES) to[0] = from[0], to[1] = from[1], to[2] = from[2];
        }
        for (long x = 0; x < count; x++) {
            weigh(strip + (first[x] - left) * LANES, LANES, taps[x], weights + x * room, LANES, made);
            uint8_t *to = out + (top * count + x) * 3;
            for (long r = 0; r < rows; r++, to += count * 3)
                to[0] = made[r * 3], to[1] = made[r * 3 + 1], to[2] = made[r * 3 + 2];
        }
    }
    free(strip);
    return 0;
}

/* in: [high][wide], RGB; out: [count][wide] */
static void down(const uint8_t *in, long wide, long count, const int32_t *first, const int32_t *taps,
                 const int32_t *weights, long room, uint8_t *out) {
    for (long y = 0; y < count; y++)
        weigh(in + first[y] * wide * 3, wide * 3, taps[y], weights + y * room, wide * 3, out + y * wide * 3);
}

/* image: [high][wide][3]; out: [rows][columns][3]. The y coefficients may count from any row. 0, or -1 without memory. */
int resample(const uint8_t *image, long wide, long columns, const int32_t *x_first, const int32_t *x_taps,
             const int32_t *x_weights, long x_room, long rows, const int32_t *y_first, const int32_t *y_taps,
             const int32_t *y_weights, long y_room, int32_t *y_scratch, uint8_t *out) {
    long top = y_first[0], bottom = 0;
    for (long y = 0; y < rows; y++) {
        if (y_first[y] + y_taps[y] > bottom) bottom = y_first[y] + y_taps[y];
        y_scratch[y] = y_first[y] - top;
    }
    uint8_t *middle = malloc((bottom - top) * columns * 3);
    if (!middle) return -1;
    int failed = across(image + top * wide * 3, wide, bottom - top, columns, x_first, x_taps, x_weights, x_room, middle);
    if (!failed) down(middle, columns, rows, y_scratch, y_taps, y_weights, y_room, out);
    free(middle);
    return failed;
}
