// What a row's loss and gradient are made of, as fused_kd/rows/shares.py explains: the label's cross-entropy, KL of a
// target with the label in it, and what gates look at.
#pragma once

#include "cuda_call.h"

// -log of the label's probability; infinite where the label is excluded and not all of the row.
FKD_INLINE float cross_entropy(float label_z, float top, float log_total, float inv_T) {
    return log_total + (label_z < EXCLUDED && top >= EXCLUDED ? INFINITE : (top - label_z) * inv_T);
}

// Whether the largest of a side's logits where the other excludes a token, if it excludes but some, is above log 0.
FKD_INLINE bool above_zero(float z, float top, float log_total, float inv_T, float other_top) {
    return (z - top) * inv_T - log_total > (float)LOG_LEAST && other_top >= EXCLUDED;
}

// The label's cross-entropy and the square of the student's log-sum-exp, by the weights of all terms; their factors in
// the gradient.
FKD_INLINE float label_loss(const Call *call, Norms *norms, float ce, float log_sum_exp) {
    float labels = 0.0f, z = 0.0f;
    FKD_UNROLL for (int j = 0; j < FKD_TERMS; j++) {
        const float weight = scalar(call, norms->row, j, SCALAR_weight);
        if (has(j, HARD_LABEL)) labels += weight * scalar(call, norms->row, j, SCALAR_rest);
        if (has(j, Z_LOSS)) z += weight;
    }
    norms->labels = norms->of_c = labels;
    float loss = FKD_ALL & HARD_LABEL ? weighed(labels, ce) : 0.0f;
    if (FKD_ALL & Z_LOSS) {
        norms->of_c = fmaf(2.0f * z, log_sum_exp, labels);
        loss = fmaf(z * log_sum_exp, log_sum_exp, loss);
    }
    return loss;
}

// What statistics say of a row's label, and KL(p||q).
typedef struct {
    float kl, log_p, log_q, warm_ce;
} Token;

// yt's share for the label.
FKD_INLINE float label_target(const Token *token, float lam, float rest) { return lam * exp_fast(token->log_p) + rest; }

// KL(yt||q) of a term.
FKD_INLINE float difficulty_of(const Call *call, int64_t row, int j, const Token *token) {
    const float lam = scalar(call, row, j, SCALAR_lam), rest = scalar(call, row, j, SCALAR_rest);
    const float log_lam = scalar(call, row, j, SCALAR_log_lam);
    const float p = exp_fast(token->log_p), t = label_target(token, lam, rest), log_t = log_or_tiny(t);
    const float gap = token->log_p - token->log_q;
    const float found = weighed(lam, token->kl - p * gap) + lam * log_lam * (1.0f - p) + t * (log_t - token->log_q);
    return at_least_zero(found) + (rest > 0.0f && token->warm_ce == INFINITE ? INFINITE : 0.0f);
}

// KL(yt||p): how hard the token is for its teacher.
FKD_INLINE float teachers_own(const Call *call, int64_t row, int j, const Token *token) {
    const float lam = scalar(call, row, j, SCALAR_lam), rest = scalar(call, row, j, SCALAR_rest);
    const float p = exp_fast(token->log_p), t = label_target(token, lam, rest);
    return lam * scalar(call, row, j, SCALAR_log_lam) * (1.0f - p) + t * (log_or_tiny(t) - token->log_p);
}

// Whether what a term's gate looks at exceeds gamma.
FKD_INLINE bool is_hard_row(const Call *call, const Norms *norms, int j, const Token *token, float difficulty,
                            float t_log, Pair t_norm, int *phase) {
    if (call->given) return global_read1(call->given + norms->row) != 0;
    float found = difficulty;
    if (gate_of(j) == GATE_EXCESS) found -= teachers_own(call, norms->row, j, token);
    if (gate_of(j) == GATE_KL) found = token->kl;
    if (gate_of(j) == GATE_ENTROPY) {
        float sums[FKD_RECORD];
        Pair totals[FKD_RECORD];
        entropy_sum(&call->rows, norms, t_log, sums);
        reduce(sums, totals, 1, false, 0.0f, phase);
        found = times(whole(totals[0]), t_norm);
    }
    return found > scalar(call, norms->row, j, SCALAR_gamma);
}

FKD_INLINE void add_free(Norms *norms, float share, float lam, float rest) {
    norms->of_q += share;
    norms->of_p += share * lam;
    norms->of_y += share * rest;
}
