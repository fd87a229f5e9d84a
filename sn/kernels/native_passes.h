/* Included by native.c for each dtype. */

/* ---- rows: an instance is x[0..count) ---- */

typedef VECTOR NAME(vector);
typedef MASK NAME(mask);

INLINE NAME(vector) NAME(load)(const T *x) { return LOAD_VECTOR(x); }

/* Of numbers in the arithmetic's dtype. */
INLINE NAME(vector) NAME(get)(const A *values) {
    NAME(vector) v;
    memcpy(&v, values, sizeof(v));
    return v;
}
INLINE void NAME(add)(A *to, NAME(vector) v) {
    v += NAME(get)(to);
    memcpy(to, &v, sizeof(v));
}
INLINE NAME(vector) NAME(fill)(A value) { return value - (NAME(vector)){0}; }

INLINE double NAME(total)(NAME(vector) v) {
#if LANES == 8
    v += SHUFFLE(NAME(mask), v, 4, 5, 6, 7, 0, 1, 2, 3);
    v += SHUFFLE(NAME(mask), v, 2, 3, 0, 1, 6, 7, 4, 5);
#else
    v += SHUFFLE(NAME(mask), v, 2, 3, 0, 1);
#endif
    return v[0] + v[1];
}

/* The last count % LANES values, in the upper lanes; zero elsewhere. count >= LANES. */
INLINE NAME(vector) NAME(keep_tail)(NAME(vector) v, int64_t count) {
    NAME(mask) mask;
    memcpy(&mask, (const char *)TAIL + count % LANES * sizeof(A), sizeof(mask));
    return (NAME(vector))((NAME(mask))v & mask);
}

/* Mean of the first values of a row, at most LANES. */
INLINE A NAME(start_mean)(const T *x, int64_t count) {
    if (count >= LANES) return (A)(NAME(total)(NAME(load)(x)) * (1.0 / LANES));
    double sum = 0;
    for (int64_t i = 0; i < count; i++) sum += LOAD(x[i]);
    return (A)(sum / count);
}

/* Mean and sum of squared distances from it, through a nearby centre: no digits are lost. `one` is
   1 / count. */
INLINE void NAME(centred)(const T *x, int64_t count, double one, A centre, double *mean,
                          double *square) {
    NAME(vector) a = {0}, b = {0}, c = {0}, d = {0}, e = {0}, f = {0}, g = {0}, h = {0}, v, w;
    int64_t i = 0;
    double sum = 0, squares = 0;
    if (count < LANES) {
        for (; i < count; i++) {
            A distance = LOAD(x[i]) - centre;
            sum += distance;
            squares += distance * distance;
        }
    } else {
        for (; i + 4 * LANES <= count; i += 4 * LANES) {
            a += v = NAME(load)(x + i) - centre;
            e += v * v;
            b += w = NAME(load)(x + i + LANES) - centre;
            f += w * w;
            c += v = NAME(load)(x + i + 2 * LANES) - centre;
            g += v * v;
            d += w = NAME(load)(x + i + 3 * LANES) - centre;
            h += w * w;
        }
        for (; i + LANES <= count; i += LANES) {
            b += v = NAME(load)(x + i) - centre;
            f += v * v;
        }
        c += v = NAME(keep_tail)(NAME(load)(x + count - LANES) - centre, count);
        g += v * v;
        sum = NAME(total)((a + b) + (c + d));
        squares = NAME(total)((e + f) + (g + h));
    }
    double shift = sum * one;
    *mean = centre + shift;
    *square = squares - shift * sum;
}

/* Means and biased variances of `rows` rows. Long rows are joined from blocks by Chan's formula. A
   block is summed about the mean of its first values; again, about its own, if that is more than
   two deviations away. Memory is read in one stream: a mean of first values is taken one block
   ahead, so that a short row need not wait for it. */
CLONES static void NAME(row_moments)(const T *restrict x, int64_t rows, int64_t length,
                                     double *restrict mean, double *restrict var) {
    const T *end = x + rows * length;
    A next = NAME(start_mean)(x, smaller(length, ROW_BLOCK));
    for (int64_t i = 0; i < rows; i++)
        for (int64_t start = 0; start < length; start += ROW_BLOCK) {
            int64_t count = smaller(length - start, ROW_BLOCK);
            double one = 1.0 / count, other, square;
            A centre = next;
            if (x + count < end) {
                int64_t rest = start + count == length ? length : length - start - count;
                next = NAME(start_mean)(x + count, rest);
            }
            NAME(centred)(x, count, one, centre, &other, &square);
            double away = other - centre;
            if (away * away * count > 4 * square)
                NAME(centred)(x, count, one, (A)other, &other, &square);
            if (start == 0) { mean[i] = other; var[i] = square; }
            else join(start, count, other, square, mean + i, var + i);
            x += count;
        }
    double one = 1.0 / length;
    for (int64_t i = 0; i < rows; i++) var[i] = var[i] < 0 ? 0 : var[i] * one;
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

/* dy, or 0 where ReLU let nothing pass; NaN passes, as in PyTorch */
INLINE A NAME(masked)(T dy, A d, const T *y, int64_t i, A a, A b, int act) {
    A g = LOAD(dy);
    if (act == RELU_OF_X) return a * d + b <= 0 ? 0 : g;
    if (act == RELU_OF_Y) return LOAD(y[i]) <= 0 ? 0 : g;
    return g;
}

INLINE NAME(vector) NAME(load_masked)(const T *dy, NAME(vector) d, const T *y, NAME(vector) a,
                                      NAME(vector) b, int act) {
    NAME(vector) g = NAME(load)(dy);
    if (act == RELU_OF_X) return (NAME(vector))((NAME(mask))g & ~(a * d + b <= 0));
    if (act == RELU_OF_Y) return (NAME(vector))((NAME(mask))g & ~(NAME(load)(y) <= 0));
    return g;
}

/* sum dy, sum dy (x - k) */
INLINE void NAME(row_reduce_as)(const T *restrict dy, const T *restrict x, const T *restrict y,
                                int64_t count, A a, A k, A b, int act, double *total,
                                double *product) {
    NAME(vector) s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0}, t0 = {0}, t1 = {0}, t2 = {0}, t3 = {0};
    NAME(vector) d, g, as = NAME(fill)(a), bs = NAME(fill)(b);
    int64_t i = 0;
    if (count < LANES) {
        for (; i < count; i++) {
            A distance = LOAD(x[i]) - k, gradient = NAME(masked)(dy[i], distance, y, i, a, b, act);
            *total += gradient;
            *product += gradient * distance;
        }
        return;
    }
#define STEP(s, t, keep)                                                                         \
    d = NAME(load)(x + i) - k;                                                                   \
    g = NAME(load_masked)(dy + i, d, y + i, as, bs, act);                                        \
    g = keep;                                                                                    \
    s += g;                                                                                      \
    t += g * d;                                                                                  \
    i += LANES;
    while (i + 4 * LANES <= count) {
        STEP(s0, t0, g)
        STEP(s1, t1, g)
        STEP(s2, t2, g)
        STEP(s3, t3, g)
    }
    while (i + LANES <= count) { STEP(s1, t1, g) }
    i = count - LANES;
    STEP(s2, t2, NAME(keep_tail)(g, count))
#undef STEP
    *total += NAME(total)((s0 + s1) + (s2 + s3));
    *product += NAME(total)((t0 + t1) + (t2 + t3));
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

/* Mean and sum of squared distances of every column. Blocks of rows are summed about the mean of
   the block before, the first about that of its first rows, and joined by Chan's formula. (About
   the mean of m of n rows the sum of squares is at most 1 + n / m times that about their own.) ROWS
   of them are under way at the same time. `scratch` is 3 C. */
CLONES static void NAME(column_moments)(const T *restrict x, int64_t rows, int64_t channels,
                                        int far, A *restrict scratch,
                                        double *restrict mean, double *restrict square) {
    A *restrict k = scratch, *restrict s = scratch + channels, *restrict t = s + channels;
    int64_t first = smaller(rows, COLUMN_BLOCK / 8), l;
    memset(k, 0, channels * sizeof(A));
    for (l = 0; l < first; l++)
        for (int64_t c = 0; c < channels; c++) k[c] += LOAD(x[l * channels + c]);
    for (int64_t c = 0; c < channels; c++) {
        k[c] /= first;
        mean[c] = square[c] = 0;
    }
    for (int64_t start = 0; start < rows; start += COLUMN_BLOCK) {
        int64_t end = smaller(rows, start + COLUMN_BLOCK);
        memset(s, 0, 2 * channels * sizeof(A));
        for (l = start; l < end; l += ROWS) {
            const T *from = x + l * channels;
            int64_t c = 0, count = smaller(ROWS, end - l);
            for (; c + LANES <= channels && count == ROWS; c += LANES) {
                NAME(vector) centre = NAME(get)(k + c), sum = {0}, squares = {0};
                if (far && c % LINE == 0) fetch(from + c, AHEAD, ROWS, channels * sizeof(T), 0);
                for (int r = 0; r < ROWS; r++) {
                    NAME(vector) d = NAME(load)(from + r * channels + c) - centre;
                    sum += d;
                    squares += d * d;
                }
                NAME(add)(s + c, sum);
                NAME(add)(t + c, squares);
            }
            for (; c < channels; c++)
                for (int64_t r = 0; r < count; r++) {
                    A d = LOAD(from[r * channels + c]) - k[c];
                    s[c] += d;
                    t[c] += d * d;
                }
        }
        double count = end - start, one = 1 / count;
        for (int64_t c = 0; c < channels; c++) {
            double shift = s[c] * one, own = k[c] + shift;
            join(start, count, own, t[c] - shift * s[c], mean + c, square + c);
            k[c] = (A)own;
        }
    }
}

/* Join another segment's moments, of `count` rows to `before`. */
CLONES static void NAME(column_join)(int64_t channels, double before, double count,
                                     const double *restrict other, const double *restrict more,
                                     double *restrict mean, double *restrict square) {
    for (int64_t c = 0; c < channels; c++)
        join(before, count, other[c], more[c], mean + c, square + c);
}

INLINE void NAME(column_apply_as)(const T *restrict x, const T *restrict residual, T *restrict y,
                                  int64_t rows, int64_t channels, const A *restrict a,
                                  const A *restrict k, const A *restrict b, int add, int relu,
                                  int far) {
    for (int64_t l = 0; l < rows; l++, x += channels, y += channels, residual += channels) {
        if (far) fetch(y, AHEAD_WRITTEN, (channels + LINE - 1) / LINE, 64, 1);
        for (int64_t c = 0; c < channels; c++) {
            A value = a[c] * (LOAD(x[c]) - k[c]) + b[c];
            if (add) value += LOAD(residual[c]);
            if (relu) value = value < 0 ? 0 : value;
            y[c] = STORE(value);
        }
    }
}
CLONES static void NAME(column_apply)(const T *x, const T *residual, T *y, int64_t rows,
                                      int64_t channels, const A *a, const A *k, const A *b,
                                      int relu, int far) {
    if (residual != NULL && relu)
        NAME(column_apply_as)(x, residual, y, rows, channels, a, k, b, 1, 1, far);
    else if (residual != NULL)
        NAME(column_apply_as)(x, residual, y, rows, channels, a, k, b, 1, 0, far);
    else if (relu) NAME(column_apply_as)(x, x, y, rows, channels, a, k, b, 0, 1, far);
    else NAME(column_apply_as)(x, x, y, rows, channels, a, k, b, 0, 0, far);
}

/* sum dy, sum dy (x - k) of every column; `scratch` is 2 C. */
INLINE void NAME(column_reduce_as)(const T *restrict dy, const T *restrict x,
                                   const T *restrict y, int64_t rows, int64_t channels,
                                   const A *restrict a, const A *restrict k, const A *restrict b,
                                   int act, int far, A *restrict scratch,
                                   double *restrict total, double *restrict product) {
    A *restrict s = scratch, *restrict t = scratch + channels;
    for (int64_t c = 0; c < channels; c++) total[c] = product[c] = 0;
    for (int64_t start = 0; start < rows; start += COLUMN_BLOCK) {
        int64_t end = smaller(rows, start + COLUMN_BLOCK);
        memset(s, 0, 2 * channels * sizeof(A));
        for (int64_t l = start; l < end; l += ROWS) {
            int64_t from = l * channels, c = 0, count = smaller(ROWS, end - l);
            for (; c + LANES <= channels && count == ROWS; c += LANES) {
                NAME(vector) centre = NAME(get)(k + c), sum = {0}, products = {0};
                NAME(vector) as = NAME(get)(a + c), bs = NAME(get)(b + c);
                if (far && c % LINE == 0) {
                    fetch(x + from + c, AHEAD, ROWS, channels * sizeof(T), 0);
                    fetch(dy + from + c, AHEAD, ROWS, channels * sizeof(T), 0);
                }
                for (int r = 0; r < ROWS; r++) {
                    int64_t i = from + r * channels + c;
                    NAME(vector) d = NAME(load)(x + i) - centre;
                    NAME(vector) g = NAME(load_masked)(dy + i, d, y + i, as, bs, act);
                    sum += g;
                    products += g * d;
                }
                NAME(add)(s + c, sum);
                NAME(add)(t + c, products);
            }
            for (; c < channels; c++)
                for (int64_t r = 0; r < count; r++) {
                    int64_t i = from + r * channels + c;
                    A d = LOAD(x[i]) - k[c], g = NAME(masked)(dy[i], d, y, i, a[c], b[c], act);
                    s[c] += g;
                    t[c] += g * d;
                }
        }
        for (int64_t c = 0; c < channels; c++) {
            total[c] += s[c];
            product[c] += t[c];
        }
    }
}
CLONES static void NAME(column_reduce)(const T *dy, const T *x, const T *y, int64_t rows,
                                       int64_t channels, const A *a, const A *k, const A *b,
                                       int act, int far, A *scratch, double *total,
                                       double *product) {
    if (act == RELU_OF_X)
        NAME(column_reduce_as)(dy, x, x, rows, channels, a, k, b, RELU_OF_X, far, scratch, total,
                               product);
    else if (act == RELU_OF_Y)
        NAME(column_reduce_as)(dy, x, y, rows, channels, a, k, b, RELU_OF_Y, far, scratch, total,
                               product);
    else
        NAME(column_reduce_as)(dy, x, x, rows, channels, a, k, b, NO_ACT, far, scratch, total,
                               product);
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

static void NAME(widen)(const A *values, int64_t count, double missing, double *to) {
    for (int64_t i = 0; i < count; i++) to[i] = values == NULL ? missing : values[i];
}

/* y = a (x - k) + b: a, k, b are (N, C) each. */
CLONES static void NAME(coefficients)(int64_t channels, const double *restrict mean,
                                      const double *restrict rstd, const double *restrict offset,
                                      const A *restrict weight, const A *restrict bias,
                                      A *restrict a, A *restrict k, A *restrict b) {
    for (int64_t c = 0; c < channels; c++) {
        double scale = rstd[c] * (weight == NULL ? 1 : weight[c]);
        k[c] = (A)mean[c];
        a[c] = (A)scale;
        b[c] = (A)((bias == NULL ? 0 : bias[c]) + scale * (k[c] - mean[c] - offset[c]));
    }
}

/* Instances of one value: their means, and variances of 0; or sums of dy and of dy times 0. */
CLONES static void NAME(copy)(int64_t count, const T *restrict x, double *restrict to,
                              double *restrict zero) {
    for (int64_t i = 0; i < count; i++) {
        to[i] = LOAD(x[i]);
        zero[i] = 0;
    }
}

/* Memory of the passes: what does not fit a stack. */
typedef struct {
    A *scratch;               /* 3 C for each thread */
    A *a, *k, *b, *p, *q;     /* (N, C) */
    double *partial;          /* two sums for each segment and channel */
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

static void NAME(all_coefficients)(const Layer *s, const Mix *mix, const A *weight, const A *bias,
                                   const NAME(Work) *work, Range part, int threads) {
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t n = part.from; n < part.to; n++) {
        int64_t i = n * s->channels, own = affine_row(s, n);
        NAME(coefficients)(s->channels, mix->mean + i, mix->rstd + i, mix->offset + i,
                           weight == NULL ? NULL : weight + own, bias == NULL ? NULL : bias + own,
                           work->a + i, work->k + i, work->b + i);
    }
}

static void NAME(instance_moments)(const Layer *s, const T *x, const NAME(Work) *work, double *mean,
                                   double *var, Range part, int threads) {
    int64_t channels = s->channels, length = s->length;
    if (length == 1) {
        int64_t i = part.from * channels;
        NAME(copy)(part.to * channels - i, x + i, mean + i, var + i);
        return;
    }
    if (!s->last) {
        int64_t end = part.to * channels;
        #pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t i = part.from * channels; i < end; i += BATCH)
            NAME(row_moments)(x + i * length, smaller(BATCH, end - i), length, mean + i, var + i);
        return;
    }
    int64_t step = segment_rows(s), count = segments(s);
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t task = part.from * count; task < part.to * count; task++) {
        Segment own = segment(s, task);
        double *to = work->partial + 2 * task * channels;
        NAME(column_moments)(x + own.at, own.rows, channels, is_far(s, sizeof(T)),
                             work->scratch + 3 * THREAD * channels, to, to + channels);
    }
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t n = part.from; n < part.to; n++) {
        double *own = work->partial + 2 * n * count * channels, *square = own + channels;
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

/* All samples from the last one on, whose x is in the cache; a part of them in order. */
static void NAME(apply)(const Layer *s, const T *x, const T *residual, T *y,
                        const NAME(Work) *work, int relu, Range part, int threads) {
    int64_t channels = s->channels, length = s->length;
    int64_t each = s->last ? segments(s) : channels, first = part.from * each, end = part.to * each;
    int64_t step = s->last ? 1 : task_rows(end - first, length, threads);
    int64_t count = (end - first + step - 1) / step;
    int backwards = end == s->batch * each && first == 0, far = is_far(s, sizeof(T));
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t j = 0; j < count; j++) {
        int64_t task = first + (backwards ? count - 1 - j : j) * step;
        if (s->last) {
            Segment own = segment(s, task);
            int64_t at = own.at, i = own.n * channels;
            NAME(column_apply)(x + at, residual == NULL ? NULL : residual + at, y + at, own.rows,
                               channels, work->a + i, work->k + i, work->b + i, relu, far);
            continue;
        }
        for (int64_t i = task; i < smaller(end, task + step); i++) {
            int64_t at = i * length;
            NAME(row_apply)(x + at, residual == NULL ? NULL : residual + at, y + at, length,
                            work->a[i], work->k[i], work->b[i], relu);
        }
    }
}

/* y = relu(switch_norm(x) + residual), with what the backward pass needs, and the running
   statistics' step. 1: out of memory. */
int NAME(sn_forward)(const Forward *call) {
    const Layer *s = call->layer;
    const T *x = call->x, *residual = call->residual;
    T *y = call->y;
    A *running_mean = call->running_mean, *running_var = call->running_var;
    int threads = useful_threads(s, call->threads), relu = call->relu != 0;
    int64_t channels = s->channels;
    Mix mix;
    NAME(Work) work;
    void *memory = NAME(allocate_work)(s, &work, threads, 0);
    if (memory == NULL) return 1;
    lay_out(s, call->saved, &mix);
    NAME(widen)(call->mean_logits, s->places, 0, mix.w);
    NAME(widen)(call->var_logits, s->places, 0, mix.u);
    if (s->running) {
        NAME(widen)(running_mean, channels, 0, mix.bn);
        NAME(widen)(running_var, channels, 0, mix.bn + channels);
    }
    softmax(mix.w, s->places);
    softmax(mix.u, s->places);
    int64_t step = together(s, sizeof(T), threads);
    for (int64_t from = 0; from < s->batch; from += step) {
        Range part = {from, smaller(from + step, s->batch)};
        if (constants(s))
            for (int64_t n = part.from; n < part.to; n++) {
                memcpy(mix.mean + n * channels, mix.bn, channels * sizeof(double));
                memcpy(mix.var + n * channels, mix.bn + channels, channels * sizeof(double));
            }
        else if (!call->given)
            NAME(instance_moments)(s, x, &work, mix.mean, mix.var, part, threads);
        mix_moments(s, &mix, part, call->given != 0, threads);
        if (y == NULL) continue;
        NAME(all_coefficients)(s, &mix, call->weight, call->bias, &work, part, threads);
        NAME(apply)(s, x, residual, y, &work, relu, part, threads);
    }
    if (s->update) {
        NAME(update)(s, mix.bn, call->momentum, running_mean);
        NAME(update)(s, mix.bn + s->groups * channels, call->momentum, running_var);
    }
    if (call->counter != NULL) *call->counter += 1;
    free(memory);
    return 0;
}

static void NAME(sums)(const Layer *s, const T *dy, const T *x, const T *y,
                       const NAME(Work) *work, double *total, double *product, int act,
                       int threads) {
    int64_t channels = s->channels, size = s->batch * channels, length = s->length;
    if (length == 1 && act == NO_ACT && !constants(s)) {
        NAME(copy)(size, dy, total, product);
        return;
    }
    if (!s->last) {
        #pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t i = 0; i < size; i++) {
            int64_t at = i * length;
            NAME(row_reduce)(dy + at, x + at, y == NULL ? x : y + at, length, work->a[i],
                             work->k[i], work->b[i], act, total + i, product + i);
        }
        return;
    }
    int64_t count = segments(s), tasks = s->batch * count;
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
        Segment part = segment(s, task);
        int64_t at = part.at, i = part.n * channels;
        double *own = work->partial + 2 * task * channels;
        NAME(column_reduce)(dy + at, x + at, y == NULL ? NULL : y + at, part.rows, channels,
                            work->a + i, work->k + i, work->b + i, act, is_far(s, sizeof(T)),
                            work->scratch + 3 * THREAD * channels, own, own + channels);
    }
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < s->batch; n++)
        for (int64_t i = 0; i < count; i++) {
            double *own = work->partial + 2 * (n * count + i) * channels;
            double *first = total + n * channels, *second = product + n * channels;
            for (int64_t c = 0; c < channels; c++) {
                first[c] = own[c] + (i ? first[c] : 0);
                second[c] = own[channels + c] + (i ? second[c] : 0);
            }
        }
}

/* Sums about the mean itself, where they were taken about its rounded value k; then p, q too. */
CLONES static void NAME(about_mean)(int64_t size, const A *restrict k, const double *restrict mean,
                                    const double *restrict total, double *restrict product) {
    for (int64_t i = 0; i < size; i++) product[i] += (k[i] - mean[i]) * total[i];
}
CLONES static void NAME(about_k)(int64_t size, const A *restrict k, const double *restrict mean,
                                 const double *restrict p, const double *restrict q,
                                 A *restrict p_k, A *restrict q_k) {
    for (int64_t i = 0; i < size; i++) {
        p_k[i] = (A)p[i];
        q_k[i] = (A)(q[i] + p[i] * (k[i] - mean[i]));
    }
}

/* Gradients of all inputs. 1: out of memory. */
int NAME(sn_backward)(const Backward *call) {
    const Layer *s = call->layer;
    const T *dy = call->dy, *x = call->x, *y = call->y;
    T *dx = call->dx, *d_residual = call->d_residual;
    A *grad_mean_logits = call->grad_mean_logits, *grad_var_logits = call->grad_var_logits;
    A *grad_weight = call->grad_weight, *grad_bias = call->grad_bias;
    int threads = useful_threads(s, call->threads);
    int64_t channels = s->channels, size = s->batch * channels, length = s->length;
    int act = !call->relu ? NO_ACT : y == NULL ? RELU_OF_X : RELU_OF_Y;
    double grad_w[4], grad_u[4];
    Mix mix;
    Gradients grads;
    NAME(Work) work;
    void *wide = call->state == NULL ? malloc(sn_state(s) * sizeof(double)) : NULL;
    double *state = call->state == NULL ? wide : call->state;
    void *memory = NAME(allocate_work)(s, &work, threads, 1);
    if (state == NULL || memory == NULL) {
        free(wide);
        free(memory);
        return 1;
    }
    lay_out(s, call->saved, &mix);
    lay_out_gradients(s, state, &grads);
    NAME(all_coefficients)(s, &mix, call->weight, call->bias, &work, (Range){0, s->batch}, threads);
    if (call->part == REST) {
        double one = 1 / call->values;
        spread_rows(s->batch, channels, mix.mean, mix.bn, one, 2 * one, grads.pools,
                    grads.pools + channels, grads.p, grads.q);
    } else {
        NAME(widen)(call->weight, s->affine * channels, 1, grads.weight);
        NAME(sums)(s, dy, x, y, &work, grads.total, grads.product, act, threads);
        NAME(about_mean)(size, work.k, mix.mean, grads.total, grads.product);
        mix_backward(s, &mix, &grads, call->part, grad_w, grad_u);
        for (int64_t i = 0; i < s->places; i++) {
            grad_mean_logits[i] = (A)grad_w[i];
            grad_var_logits[i] = (A)grad_u[i];
        }
        for (int64_t c = 0; c < s->affine * channels && grad_weight != NULL; c++)
            grad_weight[c] = (A)grads.grad_weight[c];
        for (int64_t c = 0; c < s->affine * channels && grad_bias != NULL; c++)
            grad_bias[c] = (A)grads.grad_bias[c];
    }
    if (call->part == SUMS) {
        free(memory);
        return 0;
    }
    NAME(about_k)(size, work.k, mix.mean, grads.p, grads.q, work.p, work.q);
    if (dx != NULL && !s->last) {
        int64_t step = task_rows(size, length, threads), tasks = (size + step - 1) / step;
        #pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t j = 0; j < tasks; j++)
            for (int64_t i = larger(0, size - (j + 1) * step); i < size - j * step; i++) {
                int64_t at = i * length;
                NAME(row_apply2)(dy + at, x + at, y == NULL ? x : y + at, dx + at,
                                 d_residual == NULL ? NULL : d_residual + at, length, work.a[i],
                                 work.k[i], work.b[i], work.p[i], work.q[i], act);
            }
    } else if (dx != NULL) {
        int64_t tasks = s->batch * segments(s);
        #pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t j = 0; j < tasks; j++) {
            Segment part = segment(s, tasks - 1 - j);
            int64_t at = part.at, i = part.n * channels;
            NAME(column_apply2)(dy + at, x + at, y == NULL ? NULL : y + at, dx + at,
                                d_residual == NULL ? NULL : d_residual + at, part.rows, channels,
                                work.a + i, work.k + i, work.b + i, work.p + i, work.q + i, act);
        }
    }
    free(wide);
    free(memory);
    return 0;
}

#undef T
#undef LANES
#undef VECTOR
#undef MASK
#undef LOAD_VECTOR
#undef A
#undef NAME
#undef LOAD
#undef STORE
