/* The layer on the CPU, compiled when the package is installed where there is a C compiler.

   Two passes over x forward, two over dy and x backward, in either layout; everything on (N, C)
   numbers in double, with the formulas of __init__.py. Sums are taken over short pieces in the
   dtype of the arithmetic, joined in double. Who sums what does not depend on the number of
   threads, so neither do the results. native.py calls it; nothing here knows Python or torch. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

/* Loops over a tensor are compiled for wide vectors too, and chosen when the library is loaded. */
#if defined(SN_NO_CLONES) || !defined(__x86_64__) || !defined(__linux__) || !defined(__GLIBC__)
#define CLONES
#elif defined(__clang__) || __GNUC__ < 12
#define CLONES __attribute__((target_clones("avx2", "default")))
#else
#define CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#endif
#define INLINE static inline __attribute__((always_inline))

#define ROW_BLOCK 4096   /* values of a row that are summed at once: they stay in L1 */
#define BATCH 16         /* rows whose moments are one task */
#define COLUMN_BLOCK 64  /* rows of (L, C) whose sums are kept in the arithmetic's dtype */
#define ROWS 4           /* of these, those that are summed at once */
#define SEGMENT 65536    /* values of a sample (L, C) that are one task, at least */
#define PIECE 262144     /* values of rows that are one task, about */
#define CACHE 524288     /* bytes of x that stay in the cache from one pass over it to the next */
#define AHEAD 16384      /* bytes from a value in use to one that is asked for from memory */
#define AHEAD_WRITTEN 4096
#define LEAST 32768      /* values a thread is worth */

#include "native.h"

enum { NO_ACT, RELU_OF_X, RELU_OF_Y };  /* where the sign of the output comes from */

#ifndef SN_SOURCE
#define SN_SOURCE 0 /* setup.py: a checksum of the sources */
#endif
unsigned sn_source(void) { return SN_SOURCE; }

int sn_parallel(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static int useful_threads(const Layer *s, int threads) {
    return (int)smaller(threads, 1 + s->batch * s->channels * s->length / LEAST);
}

typedef struct {
    int64_t from, to;  /* samples */
} Range;

/* Whether a tensor is read from memory rather than from a cache. */
static int is_far(const Layer *s, int64_t size) {
    return s->batch * s->channels * s->length * size > 8 << 20;
}

/* How many samples are read the second time after the first time: all, unless they are independent
   of each other and far. Then as many as stay in the cache. */
static int64_t together(const Layer *s, int64_t size, int threads) {
    if ((s->bn >= 0 && !s->running) || !is_far(s, size)) return s->batch;
    return larger(threads, CACHE / (s->channels * s->length * size));
}

/* Whether the running statistics are all there is: the instances' own are not asked for. */
static int constants(const Layer *s) { return s->running && s->places == 1; }

/* Rows of (L, C) in one task, and tasks per sample. */
static int64_t segment_rows(const Layer *s) {
    return smaller(s->length, larger(COLUMN_BLOCK, SEGMENT / s->channels));
}
static int64_t segments(const Layer *s) {
    int64_t rows = segment_rows(s);
    return (s->length + rows - 1) / rows;
}

/* One task: `rows` rows of sample n, from the value `at` of the tensor on. */
typedef struct {
    int64_t n, rows, at;
} Segment;

static Segment segment(const Layer *s, int64_t task) {
    int64_t step = segment_rows(s), count = segments(s), n = task / count;
    int64_t start = task % count * step;
    return (Segment){n, smaller(step, s->length - start), (n * s->length + start) * s->channels};
}

/* How many of `rows` rows are one task, read in order: no thread has a task more than another. */
static int64_t task_rows(int64_t rows, int64_t length, int threads) {
    int64_t tasks = threads * larger(1, rows * length / (PIECE * threads));
    return (rows + tasks - 1) / tasks;
}

/* Ask for `count` lines of memory, `stride` bytes apart, to be read or written. */
INLINE void fetch(const void *at, int64_t ahead, int64_t count, int64_t stride, int write) {
    uintptr_t start = (uintptr_t)at + ahead;
    for (int64_t i = 0; i < count; i++)
        if (write) __builtin_prefetch((const void *)(start + i * stride), 1, 3);
        else __builtin_prefetch((const void *)(start + i * stride), 0, 2);
}

/* Join a mean and a sum of squared distances of `count` values to those of `before` others, by
   Chan's formula. */
INLINE void join(double before, double count, double other, double more, double *mean,
                 double *square) {
    double share = count / (before + count), delta = other - *mean;
    *mean += delta * share;
    *square += more + delta * share * before * delta;
}

/* ---- numbers per (n, c) ---- */

/* What the forward pass leaves for the backward one, in doubles that the caller allocates. */
typedef struct {
    double *w, *u;                 /* importance weights of means and variances, 4 each */
    double *mean, *var;            /* (N, C), of the instances */
    double *rstd, *offset;         /* (N, C): y = weight rstd (x - mean - offset) + bias */
    double *ln, *gn, *bn;          /* means, then variances: (2, N), (2, N, Q), (2, G, C) */
} Mix;

/* Lay `mix` out in `memory`; returns the number of doubles. */
static int64_t lay_out(const Layer *s, double *memory, Mix *mix) {
    int64_t size = s->batch * s->channels;
    int64_t sizes[] = {4, 4, size, size, size, size, s->ln < 0 ? 0 : 2 * s->batch,
                       s->gn < 0 ? 0 : 2 * s->batch * s->num_groups,
                       s->bn < 0 ? 0 : 2 * s->groups * s->channels};
    double **fields[] = {&mix->w, &mix->u, &mix->mean, &mix->var, &mix->rstd, &mix->offset,
                         &mix->ln, &mix->gn, &mix->bn};
    int64_t count = 0;
    for (int i = 0; i < 9; count += sizes[i++])
        if (memory != NULL) *fields[i] = memory + count;
    return count;
}

int64_t sn_saved(const Layer *s) {
    Mix mix;
    return lay_out(s, NULL, &mix);
}

static void softmax(double *ratios, int64_t places) {
    double top = ratios[0], total = 0;
    for (int i = 1; i < places; i++) top = ratios[i] > top ? ratios[i] : top;
    for (int i = 0; i < places; i++) total += ratios[i] = exp(ratios[i] - top);
    for (int i = 0; i < places; i++) ratios[i] /= total;
}

/* Moments of `count` moments in a row: the law of total variance. */
CLONES static void pool_row(const double *mean, const double *var, int64_t count, double *joined,
                            double *joined_var) {
    double sum = 0, vars = 0, spread = 0;
    #pragma omp simd reduction(+ : sum, vars)
    for (int64_t i = 0; i < count; i++) { sum += mean[i]; vars += var[i]; }
    double centre = sum / count;
    #pragma omp simd reduction(+ : spread)
    for (int64_t i = 0; i < count; i++) spread += (mean[i] - centre) * (mean[i] - centre);
    *joined = centre;
    *joined_var = (vars + spread) / count;
}

/* Moments of `count` rows of C moments each, for every channel. */
CLONES static void pool_rows(const double *mean, const double *var, int64_t count, int64_t channels,
                             double *joined, double *joined_var) {
    double share = 1.0 / count;
    memset(joined, 0, channels * sizeof(double));
    memset(joined_var, 0, channels * sizeof(double));
    for (int64_t n = 0; n < count; n++, mean += channels, var += channels)
        for (int64_t c = 0; c < channels; c++) {
            joined[c] += mean[c] * share;
            joined_var[c] += var[c] * share;
        }
    mean -= count * channels;
    for (int64_t n = 0; n < count; n++, mean += channels)
        for (int64_t c = 0; c < channels; c++)
            joined_var[c] += (mean[c] - joined[c]) * (mean[c] - joined[c]) * share;
}

/* The moments of bn that sample n uses. */
static const double *bn_means(const Layer *s, const Mix *mix, int64_t n) {
    return mix->bn + n / (s->batch / s->groups) * s->channels;
}
static const double *bn_vars(const Layer *s, const Mix *mix, int64_t n) {
    return bn_means(s, mix, n) + s->groups * s->channels;
}

/* Where sample n's weight, bias and their gradients begin. */
static int64_t affine_row(const Layer *s, int64_t n) {
    return n * s->affine / s->batch * s->channels;
}

/* Channels from `first` to `end` of a sample, where ln and gn are one mean each: gives the offset,
   from var0 + the other variances the reciprocal deviation. in and bn are there or not: 0 times an
   infinite variance would be NaN. */
INLINE void mix_channels(int64_t first, int64_t end, double var0, double w_ln, double ln_mean,
                         double w_gn, double gn_mean, double u_in, double w_bn, double u_bn,
                         const double *restrict mean, const double *restrict var,
                         const double *restrict bn_mean, const double *restrict bn_var,
                         double *restrict rstd, double *restrict offset, int in, int bn) {
    double common = 1.0 / sqrt(var0);
    for (int64_t c = first; c < end; c++) {
        double mixed = var0, shift = w_ln * (ln_mean - mean[c]) + w_gn * (gn_mean - mean[c]);
        if (in) mixed += u_in * var[c];
        if (bn) {
            mixed += u_bn * bn_var[c];
            shift += w_bn * (bn_mean[c] - mean[c]);
        }
        offset[c] = shift;
        rstd[c] = in || bn ? 1.0 / sqrt(mixed) : common;
    }
}

CLONES static void mix_sample(const Layer *s, const Mix *mix, int64_t n) {
    int64_t channels = s->channels, groups = s->gn < 0 ? 1 : s->num_groups;
    int64_t width = channels / groups, i = n * channels;
    const double *mean = mix->mean + i, *var = mix->var + i;
    const double *bn_mean = s->bn < 0 ? mean : bn_means(s, mix, n);
    const double *bn_var = s->bn < 0 ? var : bn_vars(s, mix, n);
    double *rstd = mix->rstd + i, *offset = mix->offset + i;
    double u_in = s->in < 0 ? 0 : mix->u[s->in], w_bn = s->bn < 0 ? 0 : mix->w[s->bn];
    double u_bn = s->bn < 0 ? 0 : mix->u[s->bn], w_ln = 0, ln_mean = 0, ln_var = 0;
    if (s->ln >= 0) {
        w_ln = mix->w[s->ln];
        ln_mean = mix->ln[n];
        ln_var = mix->u[s->ln] * mix->ln[s->batch + n];
    }
    for (int64_t g = 0; g < groups; g++) {
        int64_t first = g * width, end = first + width;
        double w_gn = 0, gn_mean = 0, var0 = s->eps + ln_var;
        if (s->gn >= 0) {
            w_gn = mix->w[s->gn];
            gn_mean = mix->gn[n * groups + g];
            var0 += mix->u[s->gn] * mix->gn[(s->batch + n) * groups + g];
        }
#define MIX(in, bn)                                                                              \
    mix_channels(first, end, var0, w_ln, ln_mean, w_gn, gn_mean, u_in, w_bn, u_bn, mean, var,    \
                 bn_mean, bn_var, rstd, offset, in, bn)
        if (s->in >= 0 && s->bn >= 0) MIX(1, 1);
        else if (s->in >= 0) MIX(1, 0);
        else if (s->bn >= 0) MIX(0, 1);
        else MIX(0, 0);
#undef MIX
    }
}

/* Pool the instances' moments, those of bn unless `given`, and mix them. */
static void mix_moments(const Layer *s, const Mix *mix, Range part, int given, int threads) {
    int64_t channels = s->channels, width = channels / s->num_groups;
    const double *mean = mix->mean, *var = mix->var;
    if (s->bn >= 0 && !s->running && !given) {
        int64_t count = s->batch / s->groups;
        for (int64_t g = 0; g < s->groups; g++)
            pool_rows(mean + g * count * channels, var + g * count * channels, count, channels,
                      mix->bn + g * channels, mix->bn + (s->groups + g) * channels);
    }
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t n = part.from; n < part.to; n++) {
        const double *m = mean + n * channels, *v = var + n * channels;
        if (s->ln >= 0) pool_row(m, v, channels, mix->ln + n, mix->ln + s->batch + n);
        for (int64_t g = 0; g < s->num_groups && s->gn >= 0; g++) {
            double *place = mix->gn + n * s->num_groups + g;
            pool_row(m + g * width, v + g * width, width, place, place + s->batch * s->num_groups);
        }
        mix_sample(s, mix, n);
    }
}

/* P, Q and the sums for the gradients of weight and bias of one sample. */
CLONES static void parts_of_sample(int64_t channels, const double *restrict weight,
                                   const double *restrict rstd, const double *restrict offset,
                                   const double *restrict total, const double *restrict product,
                                   double *restrict mean_part, double *restrict var_part,
                                   double *restrict p, double *restrict q,
                                   double *restrict grad_weight, double *restrict grad_bias) {
    for (int64_t c = 0; c < channels; c++) {
        double slope = rstd[c] * (product[c] - offset[c] * total[c]);
        double scale = rstd[c] * weight[c];
        grad_weight[c] += slope;
        grad_bias[c] += total[c];
        mean_part[c] = scale * total[c];
        var_part[c] = rstd[c] * slope * scale;
        p[c] = q[c] = 0;
    }
}

/* A pooled statistic of `count` values in a row: adds its part to p, q and the importance
   weights' gradients. */
CLONES static void spread_row(int64_t count, const double *restrict mean, double pooled_mean,
                              double pooled_var, double w, double u,
                              const double *restrict mean_part, const double *restrict var_part,
                              double *restrict p, double *restrict q, double *grad_w,
                              double *grad_u) {
    double sum_p = 0, sum_q = 0, dot = 0;
    #pragma omp simd reduction(+ : sum_p, sum_q, dot)
    for (int64_t c = 0; c < count; c++) {
        sum_p += mean_part[c];
        sum_q += var_part[c];
        dot += mean_part[c] * (mean[c] - pooled_mean);
    }
    *grad_w += dot;
    *grad_u -= 0.5 * sum_q * pooled_var;
    sum_p *= w / count;
    sum_q *= u / count;
    for (int64_t c = 0; c < count; c++) {
        p[c] += sum_q;
        q[c] += sum_q * (mean[c] - pooled_mean) + sum_p;
    }
}

CLONES static double dot(int64_t count, const double *restrict a, const double *restrict b) {
    double sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < count; c++) sum += a[c] * b[c];
    return sum;
}

/* in of one sample. */
CLONES static void own_row(int64_t count, const double *restrict var, double w, double u,
                           const double *restrict mean_part, const double *restrict var_part,
                           double *restrict p, double *restrict q, double *grad_u) {
    for (int64_t c = 0; c < count; c++) {
        p[c] += u * var_part[c];
        q[c] += w * mean_part[c];
    }
    *grad_u -= 0.5 * dot(count, var_part, var);
}

/* bn of running statistics: constants, which reach the importance weights alone. */
CLONES static void constant_row(int64_t count, const double *restrict mean,
                                const double *restrict running_mean,
                                const double *restrict running_var,
                                const double *restrict mean_part,
                                const double *restrict var_part, double *grad_w, double *grad_u) {
    double sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < count; c++) sum += mean_part[c] * (mean[c] - running_mean[c]);
    *grad_w += sum;
    *grad_u -= 0.5 * dot(count, var_part, running_var);
}

/* bn of one group of `count` samples: the sums, and the importance weights' gradients. */
CLONES static void sum_rows(int64_t count, int64_t channels, const double *restrict mean,
                            const double *restrict pooled_mean, const double *restrict pooled_var,
                            const double *restrict mean_part, const double *restrict var_part,
                            double *restrict sum_p, double *restrict sum_q, double *grad_w,
                            double *grad_u) {
    double dot = 0, dot_var = 0;
    memset(sum_p, 0, channels * sizeof(double));
    memset(sum_q, 0, channels * sizeof(double));
    for (int64_t n = 0, i = 0; n < count; n++, i += channels)
        #pragma omp simd reduction(+ : dot)
        for (int64_t c = 0; c < channels; c++) {
            sum_p[c] += mean_part[i + c];
            sum_q[c] += var_part[i + c];
            dot += mean_part[i + c] * (mean[i + c] - pooled_mean[c]);
        }
    #pragma omp simd reduction(+ : dot_var)
    for (int64_t c = 0; c < channels; c++) dot_var += sum_q[c] * pooled_var[c];
    *grad_w += dot;
    *grad_u -= 0.5 * dot_var;
}

/* Its part of p and q from these sums, which are multiplied by w and u. */
CLONES static void spread_rows(int64_t count, int64_t channels, const double *restrict mean,
                               const double *restrict pooled_mean, double w, double u,
                               double *restrict sum_p, double *restrict sum_q,
                               double *restrict p, double *restrict q) {
    for (int64_t c = 0; c < channels; c++) {
        sum_p[c] *= w;
        sum_q[c] *= u;
    }
    for (int64_t n = 0, i = 0; n < count; n++, i += channels)
        for (int64_t c = 0; c < channels; c++) {
            p[i + c] += sum_q[c];
            q[i + c] += sum_q[c] * (mean[i + c] - pooled_mean[c]) + sum_p[c];
        }
}

static void softmax_backward(const double *ratios, double *grads, int64_t places) {
    double common = 0;
    for (int i = 0; i < places; i++) common += ratios[i] * grads[i];
    for (int i = 0; i < places; i++) grads[i] = ratios[i] * (grads[i] - common);
}

/* Of the backward pass alone, in one piece of memory. */
typedef struct {
    double *pools;                     /* (2, C) */
    double *weight;                    /* (affine, C) */
    double *total, *product;           /* (N, C): sum dy, sum dy (x - mean) */
    double *mean_part, *var_part;      /* (N, C): P, Q of __init__.py */
    double *p, *q;                     /* (N, C): dx = scale dy + p (x - mean) + q */
    double *grad_weight, *grad_bias;   /* (affine, C) */
} Gradients;

int64_t sn_state(const Layer *s) {
    return (2 + 6 * s->batch + 3 * s->affine) * s->channels;
}

static void lay_out_gradients(const Layer *s, double *memory, Gradients *to) {
    int64_t c = s->channels, nc = s->batch * c, ac = s->affine * c;
    to->pools = memory;
    memory += 2 * c;
    double **wide[] = {&to->total, &to->product, &to->mean_part, &to->var_part, &to->p, &to->q};
    for (int i = 0; i < 6; i++, memory += nc) *wide[i] = memory;
    double **narrow[] = {&to->weight, &to->grad_weight, &to->grad_bias};
    for (int i = 0; i < 3; i++, memory += ac) *narrow[i] = memory;
}

/* From total and product to p, q and the gradients of the parameters. */
static void mix_backward(const Layer *s, const Mix *mix, const Gradients *to, int part,
                         double *grad_w, double *grad_u) {
    int64_t channels = s->channels, width = channels / s->num_groups;
    const double *mean = mix->mean, *var = mix->var;
    double each = -1.0 / s->length;
    memset(to->grad_weight, 0, s->affine * channels * sizeof(double));
    memset(to->grad_bias, 0, s->affine * channels * sizeof(double));
    memset(grad_w, 0, 4 * sizeof(double));
    memset(grad_u, 0, 4 * sizeof(double));
    for (int64_t n = 0, i = 0; n < s->batch; n++, i += channels) {
        const double *mean_part = to->mean_part + i, *var_part = to->var_part + i;
        int64_t own = affine_row(s, n);
        parts_of_sample(channels, to->weight + own, mix->rstd + i, mix->offset + i, to->total + i,
                        to->product + i, to->mean_part + i, to->var_part + i, to->p + i,
                        to->q + i, to->grad_weight + own, to->grad_bias + own);
        if (s->in >= 0)
            own_row(channels, var + i, each * mix->w[s->in], each * mix->u[s->in], mean_part,
                    var_part, to->p + i, to->q + i, grad_u + s->in);
        if (s->ln >= 0)
            spread_row(channels, mean + i, mix->ln[n], mix->ln[s->batch + n],
                       each * mix->w[s->ln], each * mix->u[s->ln], mean_part, var_part,
                       to->p + i, to->q + i, grad_w + s->ln, grad_u + s->ln);
        for (int64_t g = 0; g < s->num_groups && s->gn >= 0; g++) {
            int64_t j = i + g * width, place = n * s->num_groups + g;
            spread_row(width, mean + j, mix->gn[place], mix->gn[s->batch * s->num_groups + place],
                       each * mix->w[s->gn], each * mix->u[s->gn], to->mean_part + j,
                       to->var_part + j, to->p + j, to->q + j, grad_w + s->gn, grad_u + s->gn);
        }
        if (s->bn >= 0 && s->running)
            constant_row(channels, mean + i, mix->bn, mix->bn + channels, mean_part, var_part,
                         grad_w + s->bn, grad_u + s->bn);
    }
    if (s->bn >= 0 && !s->running) {
        int64_t count = s->batch / s->groups;
        for (int64_t g = 0; g < s->groups; g++) {
            int64_t i = g * count * channels;
            double *sum_p = to->pools, *sum_q = to->pools + channels;
            const double *pooled = mix->bn + g * channels;
            sum_rows(count, channels, mean + i, pooled, pooled + s->groups * channels,
                     to->mean_part + i, to->var_part + i, sum_p, sum_q, grad_w + s->bn,
                     grad_u + s->bn);
            double w = mix->w[s->bn], u = mix->u[s->bn];
            if (part == SUMS)
                spread_rows(0, channels, mean, pooled, -w, -0.5 * u, sum_p, sum_q, NULL, NULL);
            else
                spread_rows(count, channels, mean + i, pooled, each * w / count, each * u / count,
                            sum_p, sum_q, to->p + i, to->q + i);
        }
    }
    softmax_backward(mix->w, grad_w, s->places);
    softmax_backward(mix->u, grad_u, s->places);
}

/* ---- passes over a tensor, once for each dtype: T the tensor's, A the arithmetic's ---- */

#define PASTE(a, b) a##_##b
#define JOIN(a, b) PASTE(a, b)
#define LINE (64 / (int64_t)sizeof(T))  /* values in a line of the cache */

/* Vectors of the arithmetic, for sums along rows: the compiler splits them where they are wider
   than the processor's. */
typedef float floats __attribute__((vector_size(32)));
typedef double doubles __attribute__((vector_size(32)));
typedef uint32_t words __attribute__((vector_size(32)));
typedef int32_t ints __attribute__((vector_size(32)));  /* masks, as comparisons give them */
typedef int64_t longs __attribute__((vector_size(32)));
typedef uint16_t halves __attribute__((vector_size(16)));

static const uint32_t TAIL[16] = {0,   0,   0,   0,   0,   0,   0,   0,
                                  ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u};

/* Lanes of a vector in another order: `mask` is a vector type of as many whole numbers. */
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(mask, v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#endif
#endif
#ifndef SHUFFLE
#define SHUFFLE(mask, v, ...) __builtin_shuffle(v, (mask){__VA_ARGS__})
#endif

INLINE floats load_floats(const float *x) {
    floats v;
    memcpy(&v, x, sizeof(v));
    return v;
}
INLINE doubles load_doubles(const double *x) {
    doubles v;
    memcpy(&v, x, sizeof(v));
    return v;
}
INLINE floats load_bfloat16s(const uint16_t *x) {
    halves v;
    memcpy(&v, x, sizeof(v));
    return (floats)(__builtin_convertvector(v, words) << 16);
}

#define T float
#define A float
#define NAME(function) JOIN(function, f32)
#define LOAD(x) (x)
#define STORE(x) (x)
#define VECTOR floats
#define MASK ints
#define LANES 8
#define LOAD_VECTOR(x) load_floats(x)
#include "native_passes.h"

#define T double
#define A double
#define NAME(function) JOIN(function, f64)
#define LOAD(x) (x)
#define STORE(x) (x)
#define VECTOR doubles
#define MASK longs
#define LANES 4
#define LOAD_VECTOR(x) load_doubles(x)
#include "native_passes.h"

INLINE float from_bfloat16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
INLINE uint16_t to_bfloat16(float x) { /* to nearest, even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits += 0x7fff + (bits >> 16 & 1);
    return x != x ? 0x7fc0 : bits >> 16;
}
#define T uint16_t
#define A float
#define NAME(function) JOIN(function, bf16)
#define LOAD(x) from_bfloat16(x)
#define STORE(x) to_bfloat16(x)
#define VECTOR floats
#define MASK ints
#define LANES 8
#define LOAD_VECTOR(x) load_bfloat16s(x)
#include "native_passes.h"
