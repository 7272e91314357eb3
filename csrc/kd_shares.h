// What a row's loss and gradient are made of, as fused_kd/rows/shares.py explains: factors of cross-entropy, of KL and
// of the sums of terms that have their own.
#pragma once

#include "kd_call.h"

// What statistics say of a row; `ce` is the label's cross-entropy as the loss takes it, `warm_ce` at temperature T.
typedef struct {
    double kl, log_p, log_q, warm_ce, ce, log_sum_exp;
} Token;

// Factors of q, p, y and more. The gradient in the final logits is
// (of_q * q - of_p * p - of_y * y + sums) / T + (ce + 2 * z * log_sum_exp) * c - ce * y,
// with c the student's softmax at temperature 1.
typedef struct {
    double loss, q, p, y, ce, z;
} Shares;

// A factor of what may be infinite: nothing of it is nothing.
static double weighed(double weight, double value) { return weight == 0.0 && isinf(value) ? 0.0 : weight * value; }

static double label_target(const Token *token, const Scalars *own) { return own->lam * exp(token->log_p) + own->rest; }

static double log_of(double x) { return log(x > TINY ? x : TINY); }

// KL(yt||q) from KL(p||q).
static double mixed_kl(const Token *token, const Scalars *own) {
    const double p = exp(token->log_p), t = label_target(token, own);
    double value = weighed(own->lam, token->kl - p * (token->log_p - token->log_q));
    value += t * (log_of(t) - token->log_q) + (double)own->lam * own->log_lam * (1.0 - p);
    if (own->rest > 0.0f && isinf(token->warm_ce)) value += INFINITY;
    return value < 0.0 ? 0.0 : value;
}

// KL(yt||p): how hard the token is for its teacher.
static double teachers_own(const Token *token, const Scalars *own) {
    const double t = label_target(token, own);
    return (double)own->lam * own->log_lam * (1.0 - exp(token->log_p)) + t * (log_of(t) - token->log_p);
}

// H(yt) from H(p).
static double target_entropy(double entropy_t, const Token *token, const Scalars *own) {
    const double p = exp(token->log_p), t = label_target(token, own);
    const double others = own->lam * (entropy_t + p * log_of(p)) - (double)own->lam * own->log_lam * (1.0 - p);
    const double value = others - t * log_of(t);
    return value < 0.0 ? 0.0 : value;
}

static bool is_hard(const Row *r, const Token *token, double difficulty) {
    const Call *c = r->call;
    const Term *term = &c->terms[c->main];
    const Scalars *own = scalars_of(c, r->row) + c->main;
    if (term->gate == GATE_NONE) return false;
    if (c->given) return c->given[r->row];
    switch (term->gate) {
        case GATE_ENTROPY: return (float)entropy(&r->teacher, r->blocks) > own->gamma;
        case GATE_KL: return (float)token->kl > own->gamma;
        case GATE_EXCESS: return (float)(difficulty - teachers_own(token, own)) > own->gamma;
        default: return (float)difficulty > own->gamma;
    }
}

// Adds share * KL(t||q), with `lam` of the target the teacher's and `rest` the label's.
static void add_free(Shares *shares, double share, double value, double lam, double rest) {
    shares->loss += weighed(share, value);
    shares->q += share;
    shares->p += share * lam;
    shares->y += share * rest;
}

// The label's own cross-entropy, and the square of the student's log-sum-exp.
static void add_own_loss(const Row *r, const Token *token, Shares *shares) {
    const Call *c = r->call;
    const Scalars *scalars = scalars_of(c, r->row);
    for (int i = 0; i < c->term_count; i++) {
        if (c->terms[i].hard_label && !r->without_label) shares->ce += (double)scalars[i].weight * scalars[i].rest;
        if (c->terms[i].z_loss) shares->z += scalars[i].weight;
    }
    if (shares->ce != 0.0) shares->loss += weighed(shares->ce, token->ce);
    if (shares->z != 0.0) shares->loss += shares->z * token->log_sum_exp * token->log_sum_exp;
}

// All but the sums, whose terms are left in the row.
static Shares loss_shares(Row *r, const Token *token, double difficulty, bool hard) {
    const Call *c = r->call;
    const Scalars *scalars = scalars_of(c, r->row);
    Shares shares = {0};
    r->tabled_count = 0;
    for (int i = 0; i < c->term_count; i++) {
        const Term *term = &c->terms[i];
        const Scalars *own = &scalars[i];
        if (!term->has_teacher) continue;
        double share = term->mixed ? own->weight : (double)own->weight * own->lam;
        if (term->gate == GATE_ENTROPY && !hard) share = 0.0;
        const bool chosen = hard || term->gate == GATE_NONE || term->gate == GATE_ENTROPY;
        if (!term->free && chosen && !(term->kl_at_one && own->alpha == 0.0f)) {
            const double kept = term->kl_at_one ? own->kept : 1.0, floor = term->kl_at_one ? own->floor : 0.0;
            Tabled *x = &r->tabled[r->tabled_count++];
            *x = (Tabled){.term = term, .own = own, .share = share * kept, .beta = own->beta, .alpha = own->alpha};
            if (term->mixed) x->label_d = (float)(log_of(label_target(token, own)) - token->log_q);
            share *= floor;
            if (share == 0.0) continue;
        }
        if (!term->mixed)
            add_free(&shares, share, token->kl, 1.0, 0.0);
        else
            add_free(&shares, share, i == c->main ? difficulty : mixed_kl(token, own), own->lam, own->rest);
    }
    add_own_loss(r, token, &shares);
    return shares;
}

// Adds a term to the loss by its sum of h, and finds the factor of its g.
static void after_sum(Tabled *x, const Token *token, Shares *shares) {
    double factor = x->share;
    if (x->term->outer == OUTER_NONE) {
        shares->loss += weighed(x->share, x->sum);
    } else if (x->term->outer == OUTER_MINUS_LOG) {
        shares->loss += weighed(x->share, -log(x->sum));
        factor = -x->share / (x->sum < LEAST_SUM ? LEAST_SUM : x->sum);  // NaN stays NaN
    } else {
        const double w = exp(-(double)OVERLAP_DECAY * x->sum);
        shares->loss += x->share * (1.0 - w) * (1.0 - x->sum);
        add_free(shares, x->share * w, token->kl, 1.0, 0.0);
        factor = -x->share * (1.0 - w);
    }
    x->factor = (float)factor;
}
