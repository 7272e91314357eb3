// What a row tells of its token beside its loss: the columns of fused_kd.terms.STATISTICS.
#pragma once

#include "kd_shares.h"

// Whether some token has the largest logit of both sides, also where several share it.
static bool tops_agree(const Row *r) {
    float of_s[BLOCK], of_t[BLOCK];
    for (int64_t b = 0; b < r->blocks; b++) {
        if (r->student.parts[b].max < r->student.max || r->teacher.parts[b].max < r->teacher.max) continue;
        const int n = block_length(r, b);
        const float *z_s = cooled(student_logits(r->call, r->row, b * BLOCK, n, of_s), n, r->temperature, of_s);
        const float *z_t = cooled(teacher_logits(r->call, r->row, b * BLOCK, n, of_t), n, r->temperature, of_t);
        for (int i = 0; i < n; i++)
            if (z_s[i] == r->student.max && z_t[i] == r->teacher.max) return true;
    }
    return false;
}

// sum min(p, q), before anything replaces exponentials.
static double overlap(const Row *r) {
    float least[BLOCK];
    double total = 0.0;
    for (int64_t b = 0; b < r->blocks; b++) {
        const int n = block_length(r, b);
        const float *e_s = r->student.exps + b * BLOCK, *e_t = r->teacher.exps + b * BLOCK;
        const Factor norm_s = split(normaliser(&r->student, b)), norm_t = split(normaliser(&r->teacher, b));
#pragma omp simd
        for (int i = 0; i < n; i++) {
            const float q = times(e_s[i], norm_s), p = times(e_t[i], norm_t);
            least[i] = q > p ? p : q;
        }
        total += sum(least, n);
    }
    return total;
}

// Columns are NaN where there is no teacher to tell of.
static void tell(const Row *r, const Token *token, bool has_teacher) {
    const Call *c = r->call;
    float *out = c->statistics + r->row * c->told;
    for (int i = 0; i < c->told; i++) out[i] = NAN;
    out[TOLD_log_sum_exp_s] = (float)log_sum_exp(&r->student);
    out[TOLD_entropy_s] = (float)entropy(&r->student, r->blocks);
    out[TOLD_cross_entropy] = (float)token->ce;
    out[TOLD_log_q_y] = (float)token->log_q;
    if (!has_teacher) return;
    const double entropy_t = entropy(&r->teacher, r->blocks);
    out[TOLD_log_sum_exp_t] = (float)log_sum_exp(&r->teacher);
    out[TOLD_entropy_t] = (float)entropy_t;
    out[TOLD_kl] = (float)token->kl;
    out[TOLD_log_p_y] = (float)token->log_p;
    out[TOLD_target_entropy] = (float)target_entropy(entropy_t, token, scalars_of(c, r->row) + c->main);
    if (c->told <= TOLD_top_1) return;
    out[TOLD_top_1] = tops_agree(r);
    out[TOLD_overlap] = (float)overlap(r);
}
