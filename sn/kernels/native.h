/* What the functions of native.c are given: native.py packs it, autograd.cpp fills it. */

#pragma once
#include <stdint.h>

typedef struct {
    int64_t batch, channels, length;
    int64_t num_groups;                 /* of gn */
    int64_t groups;                     /* virtual GPUs of bn */
    int64_t affine;                     /* rows of weight and bias: 1, or one for each group */
    int64_t last;                       /* channels last: (N, L, C) instead of (N, C, L) */
    int64_t places, in, ln, gn, bn;     /* number of statistics; index of each, -1 if unused */
    int64_t running;                    /* bn takes the running statistics */
    int64_t update;                     /* of the running statistics */
    double eps;
} Layer;

/* NULL stands for a tensor that is not given. */
typedef struct {
    const Layer *layer;
    int64_t threads, relu;
    double momentum;
    const void *x, *residual;
    void *y;                            /* NULL: the moments alone */
    double *saved;                      /* sn_saved of them, for the backward pass */
    const void *mean_logits, *var_logits, *weight, *bias;
    void *running_mean, *running_var;   /* updated if the layer says so */
    int64_t *counter;                   /* of batches */
    int64_t given;                      /* `saved` has the moments of instances and batches */
} Forward;

typedef struct {
    const Layer *layer;
    int64_t threads, relu;
    const void *dy, *x, *y;             /* y if ReLU followed a sum */
    void *dx, *d_residual;              /* the latter only if y is given */
    double *saved;
    const void *weight, *bias;
    void *grad_mean_logits, *grad_var_logits, *grad_weight, *grad_bias;
    /* In two parts, for bn over several processes. WHOLE: neither is used. SUMS: to `state`,
       sn_state doubles whose first 2 C are the gradients of bn's mean and variance, and those of
       the parameters. REST: from `state`, where these 2 C have become those of all processes, whose
       batches have `values` values of a channel, to dx. */
    int64_t part;
    double *state;
    double values;
} Backward;
enum { WHOLE, SUMS, REST };
