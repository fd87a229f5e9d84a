/* Included by native.c for each dtype. */

/* ---- rows: an instance is x[0..count) ---- */

/* Mean and sum of squared distances from it: about a nearby centre, so that no digits are lost. */
CLONES static void NAME(block_moments)(const T *restrict x, int64_t count, double *mean,
                                       double *square) {
    A a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
    int64_t part = count >= 128 ? count / 4 : 0; /* four streams of their own: four times the speed */
    const T *x1 = x + part, *x2 = x1 + part, *x3 = x2 + part;
    #pragma omp simd reduction(+ : a0, a1, a2, a3)
    for (int64_t i = 0; i < part; i++) {
        a0 += LOAD(x[i]);
        a1 += LOAD(x1[i]);
        a2 += LOAD(x2[i]);
        a3 += LOAD(x3[i]);
    }
    #pragma omp simd reduction(+ : a0)
    for (int64_t i = 4 * part; i < count; i++) a0 += LOAD(x[i]);
    A centre = (A)(((double)a0 + a1 + a2 + a3) / count);
    a0 = a1 = a2 = a3 = 0;
    #pragma omp simd reduction(+ : a0, a1, a2, a3, b0, b1, b2, b3)
    for (int64_t i = 0; i < part; i++) {
        A d0 = LOAD(x[i]) - centre, d1 = LOAD(x1[i]) - centre;
        A d2 = LOAD(x2[i]) - centre, d3 = LOAD(x3[i]) - centre;
        a0 += d0;
        a1 += d1;
        a2 += d2;
        a3 += d3;
        b0 += d0 * d0;
        b1 += d1 * d1;
        b2 += d2 * d2;
        b3 += d3 * d3;
    }
    #pragma omp simd reduction(+ : a0, b0)
    for (int64_t i = 4 * part; i < count; i++) {
        A d = LOAD(x[i]) - centre;
        a0 += d;
        b0 += d * d;
    }
    double shift = ((double)a0 + a1 + a2 + a3) / count;
    *mean = centre + shift;
    *square = (double)b0 + b1 + b2 + b3 - shift * shift * count;
}

/* Mean and biased variance of a row, joined from blocks by Chan's formula. */
static void NAME(row_moments)(const T *x, int64_t length, double *mean, double *var) {
    double square;
    NAME(block_moments)(x, smaller(length, ROW_BLOCK), mean, &square);
    for (int64_t i = ROW_BLOCK; i < length; i += ROW_BLOCK) {
        double other, more;
        int64_t count = smaller(length - i, ROW_BLOCK);
        NAME(block_moments)(x + i, count, &other, &more);
        double delta = other - *mean, share = (double)count / (i + count);
        *mean += delta * share;
        square += more + delta * delta * share * i;
    }
    *var = square < 0 ? 0 : square / length;
}

INLINE void NAME(row_apply_as)(const T *restrict x, const T *restrict residual, T *restrict y,
                               int64_t length, A a, A k, A b, int add, int relu) {
    for (int64_t i = 0; i < length; i++) {
        A value = a * (LOAD(x[i]) - k) + b;
        if (add) value += LOAD(residual[i]);
        if (relu) value = value < 0 ? 0 : value;
        y[i] = STORE(value);
    }
}
CLONES static void NAME(row_apply)(const T *x, const T *residual, T *y, int64_t length, A a, A k,
                                   A b, int relu) {
    if (residual != NULL && relu) NAME(row_apply_as)(x, residual, y, length, a, k, b, 1, 1);
    else if (residual != NULL) NAME(row_apply_as)(x, residual, y, length, a, k, b, 1, 0);
    else if (relu) NAME(row_apply_as)(x, residual, y, length, a, k, b, 0, 1);
    else NAME(row_apply_as)(x, residual, y, length, a, k, b, 0, 0);
}

/* dy, or 0 where ReLU let nothing pass */
INLINE A NAME(masked)(T dy, A d, const T *y, int64_t i, A a, A b, int act) {
    A g = LOAD(dy);
    if (act == RELU_OF_X) return a * d + b > 0 ? g : 0;
    if (act == RELU_OF_Y) return LOAD(y[i]) > 0 ? g : 0;
    return g;
}

/* sum dy, sum dy (x - k) */
INLINE void NAME(row_reduce_as)(const T *restrict dy, const T *restrict x, const T *restrict y,
                                int64_t count, A a, A k, A b, int act, double *total,
                                double *product) {
    A s0 = 0, s1 = 0, s2 = 0, s3 = 0, t0 = 0, t1 = 0, t2 = 0, t3 = 0;
    int64_t part = count >= 128 ? count / 4 : 0;
    const T *x1 = x + part, *x2 = x1 + part, *x3 = x2 + part;
    const T *dy1 = dy + part, *dy2 = dy1 + part, *dy3 = dy2 + part;
    #pragma omp simd reduction(+ : s0, s1, s2, s3, t0, t1, t2, t3)
    for (int64_t i = 0; i < part; i++) {
        A d0 = LOAD(x[i]) - k, d1 = LOAD(x1[i]) - k;
        A d2 = LOAD(x2[i]) - k, d3 = LOAD(x3[i]) - k;
        A g0 = NAME(masked)(dy[i], d0, y, i, a, b, act);
        A g1 = NAME(masked)(dy1[i], d1, y, i + part, a, b, act);
        A g2 = NAME(masked)(dy2[i], d2, y, i + 2 * part, a, b, act);
        A g3 = NAME(masked)(dy3[i], d3, y, i + 3 * part, a, b, act);
        s0 += g0;
        s1 += g1;
        s2 += g2;
        s3 += g3;
        t0 += g0 * d0;
        t1 += g1 * d1;
        t2 += g2 * d2;
        t3 += g3 * d3;
    }
    #pragma omp simd reduction(+ : s0, t0)
    for (int64_t i = 4 * part; i < count; i++) {
        A d = LOAD(x[i]) - k, g = NAME(masked)(dy[i], d, y, i, a, b, act);
        s0 += g;
        t0 += g * d;
    }
    *total += (double)s0 + s1 + s2 + s3;
    *product += (double)t0 + t1 + t2 + t3;
}
CLONES static void NAME(row_reduce)(const T *dy, const T *x, const T *y, int64_t length, A a, A k,
                                    A b, int act, double *total, double *product) {
    *total = *product = 0;
    for (int64_t i = 0; i < length; i += ROW_BLOCK) {
        int64_t count = smaller(length - i, ROW_BLOCK);
        if (act == RELU_OF_X)
            NAME(row_reduce_as)(dy + i, x + i, y, count, a, k, b, RELU_OF_X, total, product);
        else if (act == RELU_OF_Y)
            NAME(row_reduce_as)(dy + i, x + i, y + i, count, a, k, b, RELU_OF_Y, total, product);
        else NAME(row_reduce_as)(dy + i, x + i, y, count, a, k, b, NO_ACT, total, product);
    }
}

INLINE void NAME(row_apply2_as)(const T *restrict dy, const T *restrict x, const T *restrict y,
                                T *restrict dx, T *restrict masked, int64_t length, A a, A k, A b,
                                A p, A q, int act, int keep) {
    for (int64_t i = 0; i < length; i++) {
        A d = LOAD(x[i]) - k, g = NAME(masked)(dy[i], d, y, i, a, b, act);
        dx[i] = STORE(a * g + (p * d + q));
        if (keep) masked[i] = STORE(g);
    }
}
CLONES static void NAME(row_apply2)(const T *dy, const T *x, const T *y, T *dx, T *masked,
                                    int64_t length, A a, A k, A b, A p, A q, int act) {
    if (act == RELU_OF_X)
        NAME(row_apply2_as)(dy, x, y, dx, NULL, length, a, k, b, p, q, RELU_OF_X, 0);
    else if (act == RELU_OF_Y && masked != NULL)
        NAME(row_apply2_as)(dy, x, y, dx, masked, length, a, k, b, p, q, RELU_OF_Y, 1);
    else if (act == RELU_OF_Y)
        NAME(row_apply2_as)(dy, x, y, dx, NULL, length, a, k, b, p, q, RELU_OF_Y, 0);
    else NAME(row_apply2_as)(dy, x, y, dx, NULL, length, a, k, b, p, q, NO_ACT, 0);
}

/* ---- columns: x is (rows, channels), an instance is a column ---- */

/* Mean and sum of squared distances of every column, about the mean of the first rows.
   `scratch` is 3 C. */
CLONES static void NAME(column_moments)(const T *restrict x, int64_t rows, int64_t channels,
                                        A *restrict scratch, double *restrict mean,
                                        double *restrict square) {
    A *restrict k = scratch, *restrict s = scratch + channels, *restrict t = s + channels;
    int64_t first = smaller(rows, COLUMN_BLOCK), l = 0;
    memset(k, 0, channels * sizeof(A));
    for (; l + 4 <= first; l += 4) {
        const T *x0 = x + l * channels, *x1 = x0 + channels, *x2 = x1 + channels,
                *x3 = x2 + channels;
        for (int64_t c = 0; c < channels; c++)
            k[c] += (LOAD(x0[c]) + LOAD(x1[c])) + (LOAD(x2[c]) + LOAD(x3[c]));
    }
    for (; l < first; l++)
        for (int64_t c = 0; c < channels; c++) k[c] += LOAD(x[l * channels + c]);
    for (int64_t c = 0; c < channels; c++) {
        k[c] /= first;
        mean[c] = square[c] = 0;
    }
    for (int64_t start = 0; start < rows; start += COLUMN_BLOCK) {
        int64_t end = smaller(rows, start + COLUMN_BLOCK);
        memset(s, 0, 2 * channels * sizeof(A));
        for (l = start; l + 4 <= end; l += 4) {
            const T *x0 = x + l * channels, *x1 = x0 + channels, *x2 = x1 + channels,
                    *x3 = x2 + channels;
            for (int64_t c = 0; c < channels; c++) {
                A d0 = LOAD(x0[c]) - k[c], d1 = LOAD(x1[c]) - k[c];
                A d2 = LOAD(x2[c]) - k[c], d3 = LOAD(x3[c]) - k[c];
                s[c] += (d0 + d1) + (d2 + d3);
                t[c] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
            }
        }
        for (; l < end; l++)
            for (int64_t c = 0; c < channels; c++) {
                A d = LOAD(x[l * channels + c]) - k[c];
                s[c] += d;
                t[c] += d * d;
            }
        for (int64_t c = 0; c < channels; c++) {
            mean[c] += s[c];
            square[c] += t[c];
        }
    }
    for (int64_t c = 0; c < channels; c++) {
        double shift = mean[c] / rows;
        mean[c] = k[c] + shift;
        square[c] -= shift * shift * rows;
    }
}

/* Join another segment's moments (by Chan's formula), of `count` rows to `before`. */
CLONES static void NAME(column_join)(int64_t channels, double before, double count,
                                     const double *restrict other, const double *restrict more,
                                     double *restrict mean, double *restrict square) {
    double share = count / (before + count);
    for (int64_t c = 0; c < channels; c++) {
        double delta = other[c] - mean[c];
        mean[c] += delta * share;
        square[c] += more[c] + delta * delta * share * before;
    }
}

INLINE void NAME(column_apply_as)(const T *restrict x, const T *restrict residual, T *restrict y,
                                  int64_t rows, int64_t channels, const A *restrict a,
                                  const A *restrict k, const A *restrict b, int add, int relu) {
    for (int64_t l = 0; l < rows; l++, x += channels, y += channels, residual += channels)
        for (int64_t c = 0; c < channels; c++) {
            A value = a[c] * (LOAD(x[c]) - k[c]) + b[c];
            if (add) value += LOAD(residual[c]);
            if (relu) value = value < 0 ? 0 : value;
            y[c] = STORE(value);
        }
}
CLONES static void NAME(column_apply)(const T *x, const T *residual, T *y, int64_t rows,
                                      int64_t channels, const A *a, const A *k, const A *b,
                                      int relu) {
    if (residual != NULL && relu)
        NAME(column_apply_as)(x, residual, y, rows, channels, a, k, b, 1, 1);
    else if (residual != NULL)
        NAME(column_apply_as)(x, residual, y, rows, channels, a, k, b, 1, 0);
    else if (relu) NAME(column_apply_as)(x, x, y, rows, channels, a, k, b, 0, 1);
    else NAME(column_apply_as)(x, x, y, rows, channels, a, k, b, 0, 0);
}

/* sum dy, sum dy (x - k) of every column; `scratch` is 2 C. */
INLINE void NAME(column_reduce_as)(const T *restrict dy, const T *restrict x,
                                   const T *restrict y, int64_t rows, int64_t channels,
                                   const A *restrict a, const A *restrict k, const A *restrict b,
                                   int act, A *restrict scratch, double *restrict total,
                                   double *restrict product) {
    A *restrict s = scratch, *restrict t = scratch + channels;
    for (int64_t c = 0; c < channels; c++) total[c] = product[c] = 0;
    for (int64_t start = 0; start < rows; start += COLUMN_BLOCK) {
        int64_t l = start, end = smaller(rows, start + COLUMN_BLOCK);
        memset(s, 0, 2 * channels * sizeof(A));
        for (; l + 4 <= end; l += 4) {
            const int64_t i = l * channels, one = channels, two = 2 * one, three = 3 * one;
            const T *x0 = x + i, *dy0 = dy + i, *y0 = y + i;
            for (int64_t c = 0; c < channels; c++) {
                A d0 = LOAD(x0[c]) - k[c], d1 = LOAD(x0[one + c]) - k[c];
                A d2 = LOAD(x0[two + c]) - k[c], d3 = LOAD(x0[three + c]) - k[c];
                A g0 = NAME(masked)(dy0[c], d0, y0, c, a[c], b[c], act);
                A g1 = NAME(masked)(dy0[one + c], d1, y0, one + c, a[c], b[c], act);
                A g2 = NAME(masked)(dy0[two + c], d2, y0, two + c, a[c], b[c], act);
                A g3 = NAME(masked)(dy0[three + c], d3, y0, three + c, a[c], b[c], act);
                s[c] += (g0 + g1) + (g2 + g3);
                t[c] += (g0 * d0 + g1 * d1) + (g2 * d2 + g3 * d3);
            }
        }
        for (; l < end; l++)
            for (int64_t c = 0; c < channels; c++) {
                int64_t i = l * channels + c;
                A d = LOAD(x[i]) - k[c], g = NAME(masked)(dy[i], d, y, i, a[c], b[c], act);
                s[c] += g;
                t[c] += g * d;
            }
        for (int64_t c = 0; c < channels; c++) {
            total[c] += s[c];
            product[c] += t[c];
        }
    }
}
CLONES static void NAME(column_reduce)(const T *dy, const T *x, const T *y, int64_t rows,
                                       int64_t channels, const A *a, const A *k, const A *b,
                                       int act, A *scratch, double *total, double *product) {
    if (act == RELU_OF_X)
        NAME(column_reduce_as)(dy, x, x, rows, channels, a, k, b, RELU_OF_X, scratch, total,
                               product);
    else if (act == RELU_OF_Y)
        NAME(column_reduce_as)(dy, x, y, rows, channels, a, k, b, RELU_OF_Y, scratch, total,
                               product);
    else
        NAME(column_reduce_as)(dy, x, x, rows, channels, a, k, b, NO_ACT, scratch, total, product);
}

INLINE void NAME(column_apply2_as)(const T *restrict dy, const T *restrict x, const T *restrict y,
                                   T *restrict dx, T *restrict masked, int64_t rows,
                                   int64_t channels, const A *restrict a, const A *restrict k,
                                   const A *restrict b, const A *restrict p,
                                   const A *restrict q, int act, int keep) {
    for (int64_t l = 0, i = 0; l < rows; l++, i += channels)
        for (int64_t c = 0; c < channels; c++) {
            A d = LOAD(x[i + c]) - k[c];
            A g = NAME(masked)(dy[i + c], d, y, i + c, a[c], b[c], act);
            dx[i + c] = STORE(a[c] * g + (p[c] * d + q[c]));
            if (keep) masked[i + c] = STORE(g);
        }
}
CLONES static void NAME(column_apply2)(const T *dy, const T *x, const T *y, T *dx, T *masked,
                                       int64_t rows, int64_t channels, const A *a, const A *k,
                                       const A *b, const A *p, const A *q, int act) {
    if (act == RELU_OF_X)
        NAME(column_apply2_as)(dy, x, x, dx, NULL, rows, channels, a, k, b, p, q, RELU_OF_X, 0);
    else if (act == RELU_OF_Y && masked != NULL)
        NAME(column_apply2_as)(dy, x, y, dx, masked, rows, channels, a, k, b, p, q, RELU_OF_Y, 1);
    else if (act == RELU_OF_Y)
        NAME(column_apply2_as)(dy, x, y, dx, NULL, rows, channels, a, k, b, p, q, RELU_OF_Y, 0);
    else NAME(column_apply2_as)(dy, x, x, dx, NULL, rows, channels, a, k, b, p, q, NO_ACT, 0);
}

/* ---- the layer ---- */

/* Gates, gain, shift and running statistics as doubles. */
static void NAME(widen)(const Layer *s, Mix *mix, const A *mean_logits, const A *var_logits,
                        const A *weight, const A *bias, const A *running_mean,
                        const A *running_var) {
    for (int64_t i = 0; i < s->places; i++) {
        mix->w[i] = mean_logits[i];
        mix->u[i] = var_logits[i];
    }
    for (int64_t c = 0; c < s->channels; c++) {
        mix->weight[c] = weight == NULL ? 1 : weight[c];
        mix->bias[c] = bias == NULL ? 0 : bias[c];
        if (s->running) {
            mix->bn[c] = running_mean[c];
            mix->bn[s->channels + c] = running_var[c];
        }
    }
}

/* y = a (x - k) + b: a, k, b are (N, C) each. */
CLONES static void NAME(coefficients)(int64_t channels, const double *restrict mean,
                                      const double *restrict rstd, const double *restrict offset,
                                      const double *restrict weight, const double *restrict bias,
                                      A *restrict a, A *restrict k, A *restrict b) {
    for (int64_t c = 0; c < channels; c++) {
        double scale = rstd[c] * weight[c];
        k[c] = (A)mean[c];
        a[c] = (A)scale;
        b[c] = (A)(bias[c] + scale * (k[c] - mean[c] - offset[c]));
    }
}

static void NAME(instance_moments)(const Layer *s, const T *x, A *scratch, double *partial,
                                   double *mean, double *var, int threads) {
    int64_t channels = s->channels, size = s->batch * channels, length = s->length;
    if (!s->last) {
        #pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t i = 0; i < size; i++)
            NAME(row_moments)(x + i * length, length, mean + i, var + i);
        return;
    }
    int64_t step = segment_rows(s), count = segments(s), tasks = s->batch * count;
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t start = task % count * step, rows = smaller(step, length - start);
        double *own = partial + 2 * task * channels;
        NAME(column_moments)(x + (task / count * length + start) * channels, rows, channels,
                             scratch + 3 * THREAD * channels, own, own + channels);
    }
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < s->batch; n++) {
        double *own = partial + 2 * n * count * channels, *square = own + channels;
        for (int64_t i = 1; i < count; i++) {
            double *other = own + 2 * i * channels;
            NAME(column_join)(channels, i * step, smaller(step, length - i * step), other,
                              other + channels, own, square);
        }
        for (int64_t c = 0; c < channels; c++) {
            mean[n * channels + c] = own[c];
            var[n * channels + c] = square[c] < 0 ? 0 : square[c] / length;
        }
    }
}

static void NAME(update)(const Layer *s, const double *new, double momentum, A *running) {
    for (int64_t c = 0; c < s->channels; c++) {
        double mean = 0;
        for (int64_t g = 0; g < s->groups; g++) mean += new[g * s->channels + c] / s->groups;
        running[c] = (A)(running[c] + momentum * (mean - running[c]));
    }
}

/* Memory of the passes: what does not fit a stack. */
typedef struct {
    A *scratch, *a, *k, *b, *p, *q;
    double *partial;
} NAME(Work);

static void *NAME(allocate_work)(const Layer *s, NAME(Work) *work, int threads, int backward) {
    int64_t size = s->batch * s->channels;
    int64_t partial = s->last ? 2 * size * segments(s) : 0;
    int64_t scratch = s->last ? 3 * threads * s->channels : 0;
    int64_t numbers = scratch + (backward ? 5 : 3) * size;
    double *memory = malloc(partial * sizeof(double) + numbers * sizeof(A));
    if (memory == NULL) return NULL;
    work->partial = memory;
    work->scratch = (A *)(memory + partial);
    work->a = work->scratch + scratch;
    work->k = work->a + size;
    work->b = work->k + size;
    work->p = work->b + size;
    work->q = work->p + size;
    return memory;
}

/* relu(switch_norm(x) + residual); residual and what is not there may be NULL. Writes y, the
   instances' moments (2, N, C) and the running statistics' step. 1: out of memory. */
int NAME(sn_forward)(const Layer *s, int threads, double momentum, const T *x, const T *residual,
                     T *y, double *moments, const A *mean_logits, const A *var_logits,
                     const A *weight, const A *bias, A *running_mean, A *running_var, int relu) {
    int64_t channels = s->channels, size = s->batch * channels, length = s->length;
    double *mean = moments, *var = moments + size;
    Mix mix;
    NAME(Work) work;
    threads = useful_threads(s, threads);
    void *doubles = allocate_mix(s, &mix, 0), *numbers = NAME(allocate_work)(s, &work, threads, 0);
    if (doubles == NULL || numbers == NULL) {
        free(doubles);
        free(numbers);
        return 1;
    }
    NAME(widen)(s, &mix, mean_logits, var_logits, weight, bias, running_mean, running_var);
    if (s->running && s->places == 1) /* constants: the instances' own are not asked for */
        for (int64_t n = 0; n < s->batch; n++) {
            memcpy(mean + n * channels, mix.bn, channels * sizeof(double));
            memcpy(var + n * channels, mix.bn + channels, channels * sizeof(double));
        }
    else NAME(instance_moments)(s, x, work.scratch, work.partial, mean, var, threads);
    mix_moments(s, &mix, mean, var, threads);
    if (s->update) {
        NAME(update)(s, mix.bn, momentum, running_mean);
        NAME(update)(s, mix.bn + s->groups * channels, momentum, running_var);
    }
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < s->batch; n++) {
        int64_t i = n * channels;
        NAME(coefficients)(channels, mean + i, mix.rstd + i, mix.offset + i, mix.weight, mix.bias,
                           work.a + i, work.k + i, work.b + i);
    }
    if (!s->last) {
        #pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t j = 0; j < size; j++) {
            int64_t i = size - 1 - j, at = i * length; /* backwards: the end is in the cache */
            NAME(row_apply)(x + at, residual == NULL ? NULL : residual + at, y + at, length,
                            work.a[i], work.k[i], work.b[i], relu);
        }
    } else {
        int64_t step = segment_rows(s), count = segments(s), tasks = s->batch * count;
        #pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t j = 0; j < tasks; j++) {
            int64_t task = tasks - 1 - j, n = task / count, start = task % count * step;
            int64_t at = (n * length + start) * channels;
            NAME(column_apply)(x + at, residual == NULL ? NULL : residual + at, y + at,
                               smaller(step, length - start), channels, work.a + n * channels,
                               work.k + n * channels, work.b + n * channels, relu);
        }
    }
    free(doubles);
    free(numbers);
    return 0;
}

static void NAME(sums)(const Layer *s, const T *dy, const T *x, const T *y,
                       const NAME(Work) *work, double *total, double *product, int act,
                       int threads) {
    int64_t channels = s->channels, size = s->batch * channels, length = s->length;
    if (!s->last) {
        #pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t i = 0; i < size; i++) {
            int64_t at = i * length;
            NAME(row_reduce)(dy + at, x + at, y == NULL ? x : y + at, length, work->a[i],
                             work->k[i], work->b[i], act, total + i, product + i);
        }
        return;
    }
    int64_t step = segment_rows(s), count = segments(s), tasks = s->batch * count;
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t n = task / count, start = task % count * step, at = (n * length + start) * channels;
        double *own = work->partial + 2 * task * channels;
        NAME(column_reduce)(dy + at, x + at, y == NULL ? NULL : y + at,
                            smaller(step, length - start), channels, work->a + n * channels,
                            work->k + n * channels, work->b + n * channels, act,
                            work->scratch + 3 * THREAD * channels, own, own + channels);
    }
    for (int64_t n = 0; n < s->batch; n++)
        for (int64_t i = 0; i < count; i++) {
            double *own = work->partial + 2 * (n * count + i) * channels;
            double *to = total + n * channels, *and = product + n * channels;
            for (int64_t c = 0; c < channels; c++) {
                to[c] = own[c] + (i ? to[c] : 0);
                and[c] = own[channels + c] + (i ? and[c] : 0);
            }
        }
}

/* Gradients of all inputs; `dx` and `d_residual` may be NULL, `y` is given if relu follows a sum. */
int NAME(sn_backward)(const Layer *s, int threads, const T *dy, const T *x, const T *y, T *dx,
                      T *d_residual, const double *moments, const A *mean_logits,
                      const A *var_logits, const A *weight, const A *bias, const A *running_mean,
                      const A *running_var, A *grad_mean_logits, A *grad_var_logits,
                      A *grad_weight, A *grad_bias, int relu) {
    int64_t channels = s->channels, size = s->batch * channels, length = s->length;
    const double *mean = moments, *var = moments + size;
    int act = !relu ? NO_ACT : y == NULL ? RELU_OF_X : RELU_OF_Y;
    double grad_w[4], grad_u[4];
    Mix mix;
    NAME(Work) work;
    threads = useful_threads(s, threads);
    void *doubles = allocate_mix(s, &mix, 1), *numbers = NAME(allocate_work)(s, &work, threads, 1);
    if (doubles == NULL || numbers == NULL) {
        free(doubles);
        free(numbers);
        return 1;
    }
    NAME(widen)(s, &mix, mean_logits, var_logits, weight, bias, running_mean, running_var);
    mix_moments(s, &mix, mean, var, threads);
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < s->batch; n++) {
        int64_t i = n * channels;
        NAME(coefficients)(channels, mean + i, mix.rstd + i, mix.offset + i, mix.weight, mix.bias,
                           work.a + i, work.k + i, work.b + i);
    }
    NAME(sums)(s, dy, x, y, &work, mix.total, mix.product, act, threads);
    for (int64_t i = 0; i < size; i++) /* about the mean itself, not its rounded value */
        mix.product[i] += (work.k[i] - mean[i]) * mix.total[i];
    mix_backward(s, &mix, mean, var, grad_w, grad_u);
    for (int64_t i = 0; i < s->places; i++) {
        grad_mean_logits[i] = (A)grad_w[i];
        grad_var_logits[i] = (A)grad_u[i];
    }
    for (int64_t c = 0; c < channels; c++) {
        if (grad_weight != NULL) grad_weight[c] = (A)mix.sums[c];
        if (grad_bias != NULL) grad_bias[c] = (A)mix.sums[channels + c];
    }
    for (int64_t i = 0; i < size; i++) {
        work.p[i] = (A)mix.p[i];
        work.q[i] = (A)(mix.q[i] + mix.p[i] * (work.k[i] - mean[i]));
    }
    if (dx != NULL && !s->last) {
        #pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t j = 0; j < size; j++) {
            int64_t i = size - 1 - j, at = i * length;
            NAME(row_apply2)(dy + at, x + at, y == NULL ? x : y + at, dx + at,
                             d_residual == NULL ? NULL : d_residual + at, length, work.a[i],
                             work.k[i], work.b[i], work.p[i], work.q[i], act);
        }
    } else if (dx != NULL) {
        int64_t step = segment_rows(s), count = segments(s), tasks = s->batch * count;
        #pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t j = 0; j < tasks; j++) {
            int64_t task = tasks - 1 - j, n = task / count, start = task % count * step;
            int64_t at = (n * length + start) * channels, i = n * channels;
            NAME(column_apply2)(dy + at, x + at, y == NULL ? NULL : y + at, dx + at,
                                d_residual == NULL ? NULL : d_residual + at,
                                smaller(step, length - start), channels, work.a + i, work.k + i,
                                work.b + i, work.p + i, work.q + i, act);
        }
    }
    free(doubles);
    free(numbers);
    return 0;
}

#undef T
#undef A
#undef NAME
#undef LOAD
#undef STORE
