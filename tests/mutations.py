"""Seeded faults, each of which the named tests must catch; test_mutations.py applies them to a copy, one at a time.

``old`` occurs exactly once in its file. After a change of that line, carry the fault over to the new one. A new formula,
row or engine deserves the faults that are easy to make in it.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """``tests`` are pytest node ids below ``tests/``; one of them must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _budget(objective: str, near: str = "far") -> str:
    return f"kernels/test_error_budget.py::test_hidden_fp32[1.0-{near}-{objective}-torch]"


def _budget_of(objective: str, backend: str) -> str:
    return f"kernels/test_error_budget.py::test_hidden_fp32[1.0-far-{objective}-{backend}]"


def _weighed(objective: str, backend: str) -> str:
    return f"kernels/test_rows.py::test_ignored_rows_and_weights[{objective}-{backend}]"


def _told(columns: int = 9) -> str:
    return f"kernels/test_row_statistics.py::test_each_statistic[torch-no_evo:lam=0.3-{columns}-1.0]"


def _table(divergence: str) -> str:
    return f"loss/test_objectives.py::test_table_s_g_is_the_gradient_of_its_h[{divergence}]"


def _groups(case: str) -> str:
    return f"engines/test_gradient_groups.py::test_any_grouping_gives_the_same[{case}]"


_PRODUCTS = "engines/test_cpu_products.py::test_every_layout"


def _emulated(objective: str, near: str = "far") -> str:
    return f"kernels/test_error_budget.py::test_logits[fp32-{near}-{objective}-cuda]"


def _slices(objective: str, form: str, backend: str) -> str:
    return f"kernels/test_sharded_row.py::test_slices_against_the_whole[{objective}-{form}-{backend}]"


def _logits(backend: str, objective: str, case: str = "one-hot") -> str:
    return f"kernels/test_extremes.py::test_logits[{case}-{objective}-{backend}]"


def _map(name: str, tail: str) -> str:
    return f"loss/test_maps.py::test_equals_the_oracle[{name}-{tail}-torch]"


def _mixture(case: str) -> str:
    return f"loss/test_mixtures.py::test_equals_the_oracle[{case}-torch]"


def _in_chunks(how: str) -> str:
    return f"loss/test_mixtures.py::test_chunks_reductions_and_a_second_backward[torch-self_evolution-{how}]"


def _mixed_lists(test: str, case: str) -> str:
    return f"loss/test_mixed_lists.py::test_{test}[torch-{case}]"


def _exact(objective: str, way: str) -> str:
    return f"kernels/test_exact.py::test_exact[{way}-dense-{objective}]"


def _not_numbers(objective: str, way: str) -> str:
    return f"kernels/test_not_numbers.py::test_nan_and_inf_make_loss_and_difficulty_nan[{way}-dense-{objective}]"


def _infinite(way: str) -> str:
    test = "test_infinite_where_the_reference_is_and_its_gradient"
    return f"kernels/test_infinite_loss.py::{test}[{way}-bucket-forward_kd]"


def _listed_alone(backend: str) -> str:
    return f"kernels/test_list_tails.py::test_listed_is_a_dense_loss_over_the_list_alone[1.0-{backend}]"


def _beside_a_list(backend: str) -> str:
    return f"kernels/test_list_tails.py::test_a_cross_entropy_beside_a_list_stays_over_the_vocabulary[False-{backend}]"


def _exact_rest(tail: str) -> str:
    return f"kernels/test_list_tails.py::test_an_exact_rest[reverse_kd-{tail}-torch]"


_GATES = "loss/test_identities.py::test_gates_look_at_what_they_say"
_SMALL_SHARE = "kernels/test_exact.py::test_a_share_of_a_millionth[{}]"
_DIVERGENCES, _TOKENS, _INPUTS = "fused_kd/divergences.py", "fused_kd/tokens.py", "fused_kd/inputs.py"
_ENGINE, _OPS = "fused_kd/engines/chunked.py", "fused_kd/ops.py"
_CHUNKS, _PROBLEM = "fused_kd/engines/chunks.py", "fused_kd/engines/problem.py"
_FILTER, _FILTER_TRITON = "fused_kd/engines/tile_filter.py", "fused_kd/engines/tile_filter_triton.py"
_HEAD, _PLAN = "fused_kd/engines/head_gradient.py", "fused_kd/engines/plan.py"
_TORCH, _TRITON = "fused_kd/rows/torch/row.py", "fused_kd/rows/triton/kernel.py"
_TORCH_MATH = "fused_kd/rows/torch/math.py"
_SHARDED, _SHARDED_COLUMNS = "fused_kd/rows/sharded.py", "fused_kd/rows/torch/sharded_columns.py"
_TRITON_SWEEPS, _TRITON_GRADIENT = "fused_kd/rows/triton/sweeps.py", "fused_kd/rows/triton/gradient.py"
_TRITON_BLOCKS, _TRITON_TABLED = "fused_kd/rows/triton/blocks.py", "fused_kd/rows/triton/tabled.py"
_SHARDED_KERNELS = "fused_kd/rows/triton/sharded_kernels.py"
_CSRC = "fused_kd/_csrc/"
_NATIVE, _NATIVE_TOP_K, _NATIVE_CALL = _CSRC + "kd_dense_row.h", _CSRC + "kd_top_k_row.h", _CSRC + "kd_call.h"
_TOP_K, _TOP_K_TRITON = "fused_kd/rows/top_k.py", "fused_kd/rows/triton/top_k.py"
_TOP_K_TORCH = "fused_kd/rows/torch/top_k.py"
_LISTING, _LARGEST_TRITON = "fused_kd/engines/listing.py", "fused_kd/rows/triton/largest.py"
_DRAWING = "fused_kd/engines/drawing.py"
_MIXED, _MIXED_LISTS = "fused_kd/engines/mixing.py", "fused_kd/mixed_lists.py"
_MIXING_TORCH, _MIXING_TRITON = (f"fused_kd/rows/{name}/mixing.py" for name in ("torch", "triton"))
_CUDA, _CUDA_SLOTS, _CUDA_TOP_K = _CSRC + "kd_row.cu", _CSRC + "cuda_slots.h", _CSRC + "kd_top_k.cu"
_CUDA_SHARES = _CSRC + "cuda_shares.h"
_NATIVE_SHARES, _NATIVE_SUMS, _NATIVE_GRADIENT = (_CSRC + f"kd_{name}.h" for name in ("shares", "sums", "gradient"))
_SHARES, _TRITON_SHARES = "fused_kd/rows/shares.py", "fused_kd/rows/triton/shares.py"
_TOLD, _OBJECTIVES = "fused_kd/rows/torch/statistics.py", "fused_kd/objectives/divergences.py"
_TRITON_MATH, _SHARDED_TRITON = "fused_kd/rows/triton/math.py", "fused_kd/rows/triton/sharded.py"
_LINEAR = "cold_max, factors, ROW[ALL_P], ROW[ALL_Y], ROW)\n"
_STREAMING, _STREAMING_SWEEPS = "fused_kd/engines/streaming/engine.py", "fused_kd/engines/streaming/sweeps.py"
_STREAMING_KERNELS, _STREAMING_TILES = (f"fused_kd/engines/streaming/{name}.py" for name in ("kernels", "tiles"))
_STREAMING_GRADIENT = "fused_kd/engines/streaming/gradient.py"
_MAPPING, _MAPPED, _CHOOSING = (
    "fused_kd/engines/mapping.py",
    "fused_kd/rows/torch/mapped.py",
    "fused_kd/engines/choosing.py",
)
_ARGUMENTS = "(t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v):\n    return "

MUTATIONS = [
    # the table of formulas
    Mutation("kl: sign", _DIVERGENCES, f"def kl_g{_ARGUMENTS}-t", f"def kl_g{_ARGUMENTS}t", (_table("kl"),)),
    Mutation(
        "reverse kl: sign of the loss", _DIVERGENCES,
        f"reverse_kl_h{_ARGUMENTS}-q * d", f"reverse_kl_h{_ARGUMENTS}q * d", (_budget("reverse_kd"),),
    ),
    Mutation("skewed kl: beta missing", _DIVERGENCES, "-beta * q * r", "-q * r", (_table("skew_kl"),)),
    Mutation("skewed reverse kl: a term dropped", _DIVERGENCES, "q * (log_s - beta * s)", "q * log_s", (_table("skew_reverse_kl"),)),
    Mutation(
        "jsd: weights swapped", _DIVERGENCES,
        "alpha * (t * log_r) + beta * (q * log_s)", "beta * (t * log_r) + alpha * (q * log_s)",
        (_budget("generalized_jsd"),),
    ),
    Mutation("total variation: not halved", _DIVERGENCES, "(t > q) * (t - q)) / 2", "(t > q) * (t - q))", (_budget("total_variation"),)),
    Mutation(
        "adaptive kl: weights swapped", _DIVERGENCES,
        "-beta * t - alpha * (q * d)", "-alpha * t - beta * (q * d)", (_table("adaptive_kl"),),
    ),
    Mutation(
        "adaptive kl: ties by their block's maximum", f"{_CSRC}kd_sums.h",
        "t[i] = times(exp_nonpositive(z[i] - max), norm);", "z[i] = max;",
        ("kernels/test_rows.py::test_ties_in_several_blocks_share_their_side[native]",),
    ),
    Mutation(
        "detached skewed reverse kl: flows through the mixture", _DIVERGENCES,
        f"skew_reverse_kl_detached_g{_ARGUMENTS}q * log_s", f"skew_reverse_kl_detached_g{_ARGUMENTS}q * (log_s - beta * s)",
        (_table("skew_reverse_kl_detached"),),
    ),
    Mutation("todi: sign of a weight", _DIVERGENCES, "(r * t - s * q) * d / 2", "(r * t + s * q) * d / 2", (_budget("todi"),)),
    Mutation("todi: the weight moves", _DIVERGENCES, "(s * q * (1 - d) - r * t) / 2", "(s * q * (1 + d) - r * t) / 2", (_table("todi"),)),
    Mutation("alpha-beta: a factor missing", _DIVERGENCES, "(alpha * beta * (alpha + beta))", "(alpha * beta)", (_budget("alpha_beta"),)),
    Mutation("alpha-beta: the other exponent", _DIVERGENCES, "(v - w) / alpha", "(v - w) / beta", (_table("alpha_beta"),)),
    Mutation("renyi: beta missing", _DIVERGENCES, "return beta * w", "return w", (_table("renyi"),)),
    Mutation(
        "renyi: not over 1 - alpha", _OBJECTIVES, "weight=own.weight / (1.0 - self.alpha))", "weight=own.weight)",
        (_budget("renyi"),),
    ),
    Mutation(
        "acceptance: the larger for the smaller", _DIVERGENCES, "(q > t) * t + (1 - (q > t)) * q", "(q > t) * q + (1 - (q > t)) * t",
        (_budget("acceptance"),),
    ),
    Mutation(
        "acceptance: a small sum's gradient is cut", _DIVERGENCES, "LEAST_SUM = 1.2e-37", "LEAST_SUM = 1e-30",
        ("kernels/test_rows.py::test_the_logarithm_of_a_small_sum[torch-acceptance-84.0]",),
    ),
    Mutation("acceptance: not halved", _DIVERGENCES, "(q > t) * q + q) / 2", "(q > t) * q + q)", (_table("acceptance"),)),
    Mutation("acceptance mix: another decay", _DIVERGENCES, "OVERLAP_DECAY = 3.0", "OVERLAP_DECAY = 2.0", (_budget("acceptance_mix"),)),
    Mutation(
        "symmetric kl: weights swapped", _OBJECTIVES, "(self.beta, ForwardKD(lam=1.0)), (1.0 - self.beta,",
        "(1.0 - self.beta, ForwardKD(lam=1.0)), (self.beta,", (_budget("symmetric_kl"),),
    ),
    # shares of terms
    Mutation(
        "shares: floor and the rest swapped", _SHARES, "(share * s.kept, share * s.floor)", "(share * s.floor, share * s.kept)",
        (_budget("skew_floor"),),
    ),
    Mutation("shares: the label's dropped", _SHARES, "self.y = self.y + share * rest", "self.y = self.y", (_budget("no_evo"),)),
    Mutation("shares: the teacher's without lam", _SHARES, "self.p = self.p + share * lam", "self.p = self.p + share", (_budget("no_evo"),)),
    Mutation(
        "shares: a second mixture's difficulty is the first's", _SHARES, "difficulty if i == spec.main else _mixed_kl(token, s)", "difficulty",
        (_budget("sum_of_targets"),),
    ),
    Mutation("shares: cross-entropy without its weight", _SHARES, "made.ce + s.weight * s.rest", "made.ce + s.rest", (_budget("sum"),)),
    Mutation("shares: a divergence without its weight", _SHARES, "else s.weight * s.lam", "else s.lam", (_budget("sum"),)),
    Mutation("shares: z-loss not doubled", _SHARES, "2.0 * self.z * token", "self.z * token", (_budget("z_loss"),)),
    Mutation(
        "shares: a gate of kl looks at the difficulty", _SHARES, "return token.kl > s.gamma", "return difficulty + 0 > s.gamma", (_GATES,),
    ),
    Mutation("shares: the excess is a sum", _SHARES, "difficulty - teachers_own(", "difficulty + teachers_own(", (_GATES,)),
    Mutation("shares: unsure where it is sure", _SHARES, "token.entropy_t > s.gamma", "token.entropy_t < s.gamma", (_GATES,)),
    Mutation(
        "shares: sign of a logarithm's factor", _SHARES, "-share / total.clamp", "share / total.clamp", (_budget("acceptance"),),
    ),
    Mutation("shares: all of the mix is the overlap's", _SHARES, "return -share * (1.0 - w)", "return -share", (_budget("acceptance_mix"),)),
    Mutation("shares: no kl in the mix", _SHARES, "shares.add_free(spread(share * w), ", "shares.add_free(spread(share * 0.0), ", (_budget("acceptance_mix"),)),
    Mutation(
        "native: floor and the rest swapped", _NATIVE_SHARES, "? own->kept : 1.0, floor = term->kl_at_one ? own->floor",
        "? own->floor : 1.0, floor = term->kl_at_one ? own->kept", (_budget_of("skew_floor", "native"),),
    ),
    Mutation(
        "native: sign of a logarithm's factor", _NATIVE_SHARES, "factor = -x->share / (", "factor = x->share / (",
        (_budget_of("acceptance", "native"),),
    ),
    Mutation(
        "native: a gate of kl looks at the difficulty", _NATIVE_SHARES, "return (float)token->kl > own->gamma", "return (float)difficulty > own->gamma",
        (_budget_of("self_evolution_kl", "native"),),
    ),
    Mutation(
        "triton: floor and the rest swapped", _TRITON_SHARES, "factor = share * tl.load(own + KEPT)", "factor = share * tl.load(own + FLOOR)",
        (_weighed("sum_gated", "triton"),),
    ),
    Mutation(
        "triton: sign of a logarithm's factor", _TRITON_SHARES, "factor = -factor / tl.maximum(", "factor = factor / tl.maximum(",
        (_weighed("sum_outer", "triton"),),
    ),
    Mutation(
        "cuda: floor and the rest swapped", _CUDA, "kept = share * scalar(call, row, j, SCALAR_kept)", "kept = share * scalar(call, row, j, SCALAR_floor)",
        (_weighed("sum_gated", "cuda"),),
    ),
    Mutation(
        "cuda: sign of a logarithm's factor", _CUDA, "terms[j].factor = -share * reciprocal(", "terms[j].factor = share * reciprocal(",
        (_weighed("sum_outer", "cuda"),),
    ),
    # numbers of each token
    Mutation(
        "engine: another token's numbers", _PROBLEM, "else self.scalars[tokens]", "else self.scalars.flip(0)[tokens]",
        ("loss/test_token_numbers.py::test_a_call_is_the_loop_over_its_tokens[torch-forward_kd-1]",),
    ),
    Mutation(
        "rows: all have the first one's numbers", "fused_kd/rows/contract.py", "else scalars.stride(0)", "else 0",
        ("kernels/test_token_scalars.py::test_numbers_of_each_row[1-self_evolution-native]",),
    ),
    Mutation(
        "text: an exponent's sign ends a term", "fused_kd/objectives/text.py", "(?<!\\d[eE])", "",
        ("loss/test_algebra.py::test_texts",),
    ),
    Mutation(
        "objectives: weights go unchecked", "fused_kd/objectives/base.py", '(checked_number("weight", weight, WEIGHT), each)',
        "(weight, each)", ("loss/test_algebra.py::test_what_is_refused",),
    ),
    # what is told of tokens
    Mutation("statistics: sign of the entropy", _TOLD, "keepdim=True).neg_()", "keepdim=True)", (_told(),)),
    Mutation(
        "statistics: the target's entropy without its label", _SHARES, "(others - torch.xlogy(t_y, t_y))", "(others + torch.xlogy(t_y, t_y))", (_told(),),
    ),
    Mutation("statistics: the label's of the other side", _TOLD, '"log_p_y": token.log_p_y', '"log_p_y": token.log_q_y', (_told(),)),
    Mutation("statistics: the least of both sides", _TOLD, "(q.z == q.z.amax(", "(q.z == q.z.amin(", (_told(11),)),
    Mutation(
        "statistics: ignored tokens told", _TORCH, "found.masked_fill_(ignored.unsqueeze(1), 0.0)", "found",
        ("kernels/test_row_statistics.py::test_told_beside_the_same_loss_and_gradient[torch]",),
    ),
    # excluded tokens, and scalars near their limits
    Mutation(
        "torch: infinite by the excluded token's size", _TORCH_MATH, "p >= torch.finfo(torch.float32).tiny", "p >= 1e-12",
        (_exact("no_evo", "torch"),),
    ),
    Mutation(
        "torch: what the teacher excludes stays in the gradient", _TORCH, "masked_fill_(pick(sides.outs[1]), LEFT_OUT)",
        "masked_fill_(pick(sides.outs[1]), 0.0)", (_exact("reverse_kd", "torch"),),
    ),
    Mutation("torch: 0 times infinity", _SHARES, "& (weight == 0.0), 0.0)", "& (weight < 0.0), 0.0)", ("kernels/test_sums.py::test_weights_of_0_and_1[torch]",)),
    Mutation(
        "1 - beta from fp32 beta", _OBJECTIVES, "beta=1.0 - self.alpha, alpha=self.alpha)", "beta=1.0 - self.alpha, alpha=0.99999994 - (1.0 - self.alpha))",
        (_SMALL_SHARE.format("torch"),),
    ),
    Mutation(
        "native: infinite by the excluded token's size", _NATIVE, "> LOG_LEAST", "> -27.6",
        (_exact("no_evo", "native"),),
    ),
    Mutation(
        "native: infinite where nothing is above 0", _NATIVE, "log_probability(x, cool(z, temperature)) > LOG_LEAST", "true",
        (_exact("reverse_kd", "native"),),
    ),
    Mutation(
        "native: what the teacher excludes stays in the gradient", _NATIVE_SUMS, "out_t[i] ? LEFT_OUT : a->d[i]", "out_t[i] ? 0.0f : a->d[i]",
        (_exact("reverse_kd", "native"),),
    ),
    Mutation("native: 1 - beta from beta", _NATIVE_SUMS, "raised + alpha * (t - raised)", "raised + (1.0f - beta) * (t - raised)", (_SMALL_SHARE.format("native"),)),
    Mutation("native: 0 times infinity", _NATIVE_SHARES, "return weight == 0.0 && isinf(value) ? 0.0 : weight * value;", "return weight * value;", ("kernels/test_sums.py::test_weights_of_0_and_1[native]",)),
    Mutation(
        "triton: infinite by the excluded token's size", _TRITON_MATH, "- log_total > LOG_LEAST", "- log_total > -27.6",
        (_exact("no_evo", "triton"),),
    ),
    Mutation(
        "triton: the sides' exclusions swapped", _TRITON_SWEEPS, "tl.where(z_t < EXCLUDED, z_s, OUTSIDE)", "tl.where(z_s < EXCLUDED, z_s, OUTSIDE)",
        (_exact("reverse_kd", "triton"),),
    ),
    Mutation(
        "triton: what the teacher excludes stays in the gradient", _TRITON_MATH, "LEFT_OUT = tl.constexpr(divergences.LEFT_OUT)", "LEFT_OUT = tl.constexpr(0.0)",
        (_exact("reverse_kd", "triton"),),
    ),
    Mutation("triton: 1 - beta from beta", _TRITON_MATH, "tl.where(larger, alpha, -beta)", "tl.where(larger, 1.0 - beta, -beta)", (_SMALL_SHARE.format("triton"),)),
    Mutation(
        "streaming: a split's exclusions forgotten", _STREAMING_KERNELS, "t_over = tl.maximum(t_over, tl.load(part + _T_OVER", "t_over = tl.minimum(t_over, tl.load(part + _T_OVER",
        (_exact("reverse_kd", "streaming"),),
    ),
    Mutation(
        "sharded: exclusions of one side only", _SHARDED, "(beside - top - total > LOG_LEAST) & (top_t >= limit)", "beside > math.inf",
        (_exact("reverse_kd", "slices"),),
    ),
    Mutation(
        "cuda: infinite by the excluded token's size", _CUDA_SHARES, "(float)LOG_LEAST", "-27.6f",
        (_exact("no_evo", "cuda"),),
    ),
    Mutation(
        "cuda: what the teacher excludes stays in the gradient", _CSRC + "cuda_divergence.h", "z_t < norms->bound) d = LEFT_OUT;", "z_t < norms->bound) d = 0.0f;",
        (_exact("reverse_kd", "cuda"),),
    ),
    Mutation(
        "torch: NaN is called infinite", _TORCH_MATH, "where & (value == value), math.inf", "where, math.inf",
        (_not_numbers("no_evo", "torch"),),
    ),
    Mutation(
        "native: NaN is called infinite", _NATIVE_SUMS, "? sum + INFINITY : sum;", "? INFINITY : sum;",
        (_not_numbers("reverse_kd", "native"),),
    ),
    Mutation(
        "native: the excluded label's cross-entropy hides NaN", _NATIVE, "x->log_total + INFINITY", "INFINITY",
        (_not_numbers("sft", "native"),),
    ),
    Mutation(
        "triton: NaN is called infinite", _TRITON_TABLED, "h_sum += tl.where(beyond, float(\"inf\"), 0.0)", "h_sum = tl.where(beyond, float(\"inf\"), h_sum)",
        (_not_numbers("reverse_kd", "triton"),),
    ),
    Mutation(
        "triton: the excluded label's cross-entropy hides NaN", _TRITON_MATH, "return log_total + tl.where(out, float(\"inf\"), ",
        "return tl.where(out, float(\"inf\"), log_total + ", (_not_numbers("sft", "triton"),),
    ),
    Mutation(
        "cuda: NaN is called 0", _CSRC + "cuda_math.h", "return x < 0.0f ? 0.0f : x;", "return x > 0.0f ? x : 0.0f;",
        (_not_numbers("no_evo", "cuda"),),
    ),
    Mutation(
        "top-k: the label is always its own category", _TOP_K, "    if reads_label:\n", "    if True:\n",
        ("kernels/test_lists.py::test_a_label_that_is_not_read_stays_in_the_bucket[generalized_jsd-torch]",),
    ),
    # the torch row
    Mutation("torch: label off by one", _TORCH, "y = labels.clamp(min=0)", "y = (labels - 1).clamp(min=0)", (_budget("sft"),)),
    Mutation(
        "torch: lam for 1 - lam", _SHARES, "((s.lam, s.rest) if term.mixed", "((s.rest, s.lam) if term.mixed",
        (_budget("no_evo"),),
    ),
    Mutation(
        "torch: token weights missing", _TORCH, "if inputs.weights is not None:", "if False:",
        ("kernels/test_extremes.py::test_rows_left_out_and_weighted[dense-torch]",),
    ),
    Mutation(
        "torch: ignored rows written", _TORCH, "if maybe_any(ignored):", "if False:",
        ("kernels/test_extremes.py::test_rows_left_out_and_weighted[dense-torch]",),
    ),
    Mutation(
        "torch: teacher's temperature missing", _TORCH,
        'cool(z, temperature, scratch("z_t", B)), out', "z, out", ("loss/test_loss.py::test_temperature[2.0-no_evo-torch]",),
    ),
    Mutation("torch: difference reversed", _TORCH, "torch.sub(z_t, z, out", "torch.sub(z, z_t, out", (_budget("reverse_kd"),)),
    Mutation(
        "torch: difficulty without the target's entropy", _SHARES,
        "(torch.xlogy(t_y, t_y) - t_y * token.log_q_y)", "(-t_y * token.log_q_y)", (_budget("no_evo"),),
    ),
    Mutation(
        "torch: softcap's slope without the tanh", _TORCH_MATH,
        ".neg_().add_(1.0).mul_(logits.scale)", ".mul_(logits.scale)",
        ("loss/test_loss.py::test_scale_and_softcap[{'softcap': 3.0}-sft-torch]",),
    ),
    Mutation("torch: gate reversed", _SHARES, "return difficulty > s.gamma", "return difficulty < s.gamma", (_budget("self_evolution"),)),
    # the row of a vocabulary slice
    Mutation(
        "sharded: the label's rank", _SHARDED, "labels >= bound", "labels > bound",
        (_slices("sft", "dense", "torch"), "kernels/test_sharded_row.py::test_any_slices"),
    ),
    Mutation(
        "sharded: maxima of one side only", _SHARDED, "((b - top_t) - above)", "(b - top_t)",
        (_slices("no_evo", "dense", "torch"),),
    ),
    Mutation(
        "sharded: the rest counted by every rank", _SHARDED_COLUMNS, "K + 1 if shards.rank == 0 else K", "K + 1",
        (_slices("skew", "bucket", "torch"),),
    ),
    Mutation(
        "sharded: the rest of a rank without columns", _SHARDED_COLUMNS, '"rest_top": NOWHERE}', '"rest_top": _ELSEWHERE}',
        ("kernels/test_sharded_row.py::test_a_rank_without_columns_beside_one_whose_columns_are_all_listed[[0, 3]-renormalize]",),
    ),
    Mutation(
        "sharded triton: label off by one", _SHARDED_KERNELS, "local = label - first", "local = label - first + 1",
        (_slices("sft", "dense", "triton"),),
    ),
    # the Triton row
    Mutation(
        "triton: label off by one", _TRITON, "label = tl.minimum(label, V)", "label = tl.minimum(label + 1, V)",
        (_logits("triton", "no_evo", "equal"),),
    ),
    Mutation(
        "triton: maximum not subtracted", _TRITON_GRADIENT,
        "tl.exp2(exponent(z, LOG2_E, z_max)) * of_q", "tl.exp2(z * LOG2_E) * of_q",
        ("kernels/test_rows.py::test_excluded_tokens_and_large_offsets[sft-triton]",),
    ),
    Mutation(
        "triton: row's end not masked", _TRITON_BLOCKS, "tl.where(mask, z, OUTSIDE), slope", "z, slope",
        ("kernels/test_rows.py::test_any_vocabulary[127-reverse_kd-triton]",),
    ),
    Mutation("triton: gate reversed", _TRITON_SHARES, "return seen > gamma", "return seen < gamma", (_logits("triton", "self_evolution"),)),
    Mutation(
        "triton: token weights missing", _TRITON_GRADIENT,
        f"{_LINEAR}    store_block(dlogits_row, offsets, end, gradient * (slope * weight))",
        f"{_LINEAR}    store_block(dlogits_row, offsets, end, gradient * slope)",
        ("kernels/test_extremes.py::test_rows_left_out_and_weighted[dense-triton]",),
    ),
    Mutation(
        "triton: ranking ignored", _TRITON, "hard = tl.load(given_ptr + row) != 0", "hard = difficulty > gamma",
        ("loss/test_loss.py::test_temperature[2.0-self_evolution_top_k-triton]",),
    ),
    Mutation(
        "triton: 32-bit row offsets", _TRITON, "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)",
        ("kernels/test_extremes.py::test_rows_beyond_2_31_elements[dense-triton]",),
    ),
    Mutation(
        "triton: lanes' sums joined as if their maxima were one", _TRITON_SWEEPS,
        "top, tl.sum(z_sum * tl.exp2(step), axis=0)", "top, tl.sum(z_sum, axis=0)",
        ("kernels/test_rows.py::test_temperature_scale_and_softcap[T-sft-triton]",),
    ),
    Mutation(
        "triton: lanes' KL not moved to the row's maxima", _TRITON_SWEEPS,
        "kl_sum = moved(kl_sum, t_sum, s_step, t_step)\n    if", "kl_sum = kl_sum * tl.exp2(t_step)\n    if",
        ("kernels/test_rows.py::test_any_vocabulary[1025-no_evo-triton]",),
    ),
    Mutation(
        "triton: the row's end left out of a sum", _TRITON_SWEEPS, "if whole < V:\n        sums", "if whole > V:\n        sums",
        ("kernels/test_rows.py::test_strided_inputs_and_outputs[shifted-reverse_kd-triton]",),
    ),
    Mutation(
        "triton: the last whole block left out", _TRITON_GRADIENT, "for i in range(0, blocks):\n        _write_block", "for i in range(1, blocks):\n        _write_block",
        ("kernels/test_rows.py::test_any_vocabulary[2048-self_evolution-triton]",),
    ),
    Mutation(
        "triton: written beyond the row", _TRITON_BLOCKS, "values, mask=offsets < end)", "values, mask=offsets <= end)",
        ("kernels/test_rows.py::test_strided_inputs_and_outputs[aligned-forward_kd-triton]",),
    ),
    Mutation(
        "triton: log-ratios left in powers of 2", _TRITON_MATH, "tl.fma(difference, k * LN_2, -log_ratio)", "tl.fma(difference, k, -log_ratio)",
        ("kernels/test_rows.py::test_temperature_scale_and_softcap[T, scale-reverse_kd-triton]",),
    ),
    Mutation(
        "triton: log-ratios from rounded products", _TRITON_MATH, "d = tl.fma(difference, k * LN_2, -log_ratio)", "d = tl.fma(a_t - a_s, LN_2, -log_ratio)",
        ("kernels/test_fused_products.py::test_rows[todi-fused]",),
    ),
    Mutation(
        "triton: an odd exponent of the logarithm", _TRITON_MATH, "- 0x3F3504F3) & -0x800000", "- 0x3F3504F3) & -0x1000000",
        ("kernels/test_triton.py::test_ratios_and_logarithms_keep_relative_precision",),
    ),
    Mutation(
        "sharded triton: a z-loss alone with tabled terms", _SHARDED_TRITON, "if beside else torch.zeros_like(q)", "if True else q",
        ("kernels/test_sharded_row.py::test_a_z_loss_beside_it[triton-generalized_jsd-1.0]",),
    ),
    Mutation(
        "torch: a common offset stays", _TORCH, "((top_t - top).abs() < 64.0) & (top.abs() < 64.0)", "(top_t - top).abs() < 64.0",
        ("kernels/test_rows.py::test_an_offset_of_both_sides[torch]",),
    ),
    Mutation(
        "native: the first of the largest logits alone", f"{_CSRC}kd_statistics.h", "r->teacher.parts[b].max < r->teacher.max) continue;",
        "r->teacher.parts[b].max < r->teacher.max) return false;",
        ("kernels/test_row_statistics.py::test_largest_logits_that_several_tokens_have[native]",),
    ),
    Mutation(
        "sharded triton: statistics left in powers of 2", _SHARDED_TRITON, "ranks.excess * math.log(2.0)", "ranks.excess * 1.0",
        (_slices("no_evo", "dense", "triton"),),
    ),
    # the CUDA row, in emulation; more of its faults are in test_cuda_emulator.py
    Mutation("cuda: gate reversed", _CUDA_SHARES, "return found > scalar(", "return found < scalar(", (_emulated("self_evolution", "near"),)),
    Mutation("cuda: label off by one", _CUDA_SLOTS, "distance = column - first;", "distance = column - first - 1;", (_emulated("sft"),)),
    Mutation(
        "cuda: 32-bit row offsets", _CUDA_SLOTS, "rows->dlogits + row * rows->dlogits_stride",
        "rows->dlogits + (int32_t)(row * rows->dlogits_stride)", ("kernels/test_extremes.py::test_rows_beyond_2_31_elements[dense-cuda]",),
    ),
    Mutation(
        "cuda: the next row in this row's place", _CUDA, "rows->turn = next_turn(rows);", "",
        ("kernels/test_cuda.py::test_asking_ahead_changes_nothing[room ahead-5-fp32]",),
    ),
    Mutation(
        "cuda top-k: listed entries stay in the rest", _CUDA_TOP_K, ">= 0) z[i] = OUTSIDE;", ">= 0) z[i] += 0.0f;",
        ("kernels/test_lists.py::test_matrix[far-bucket-no_evo-cuda]",),
    ),
    Mutation(
        "cuda: -inf in the sweeps after the maxima", _CUDA_SLOTS, "max_or_nan(raw, LOG_ZERO)", "raw",
        (_exact("sft", "cuda"),),
    ),
    Mutation(
        "cuda: -inf out of the way before a scale", _CUDA_SLOTS,
        "max_or_nan(raw * side->scale, LOG_ZERO)", "max_or_nan(raw, LOG_ZERO) * side->scale",
        ("kernels/test_infinite_loss.py::test_scales[cuda]",),
    ),
    Mutation(
        "triton: a scale of -inf is -inf", _TRITON_MATH, "tl.where(z < LOG_ZERO, LOG_ZERO, z)  #", "z  #",
        ("kernels/test_infinite_loss.py::test_scales[triton]",),
    ),
    # the engine
    Mutation(
        "engine: weight gradient starts from what was there", _HEAD, "first=self._first)", "first=False)",
        ("loss/test_loss.py::test_uninitialised_memory_is_never_read",),
    ),
    Mutation(
        "engine: weight gradient of the last chunk alone", _HEAD, "first=self._first)", "first=True)",
        ("kernels/test_error_budget.py::test_bias_and_chunks_with_short_last[no_evo-torch]",),
    ),
    Mutation(
        "engine: bias gradient of the last chunk alone", _HEAD, "[: self._vocab] += dlogits.sum(", "[: self._vocab] = dlogits.sum(",
        ("kernels/test_error_budget.py::test_bias_and_chunks_with_short_last[no_evo-torch]",),
    ),
    Mutation("engine: scaled twice", _HEAD, "d_hidden.mul_(self._scale)", "d_hidden.mul_(self._scale * self._scale)", (_budget("sft"),)),
    Mutation(
        "engine: ignored tokens computed", _PROBLEM, "(labels != IGNORED).nonzero()", "(labels == labels).nonzero()",
        ("loss/test_loss.py::test_gemms_run_for_valid_tokens_and_wanted_gradients_only[all]",),
    ),
    Mutation("engine: hidden gradient to other tokens", _ENGINE, "result.d_source[tokens] = d_hidden", "result.d_source[first:last] = d_hidden", (_budget("sft"),)),
    Mutation(
        "engine: another chunk's hard tokens", _CHUNKS, "else hard[self.span]", "else hard[: len(self.labels)]",
        ("loss/test_objectives.py::test_the_largest_difficulties_are_hard_across_chunks_and_ties_go_by_position",),
    ),
    Mutation(
        "engine: padding's weight gradient not cleared", _HEAD, "self._d_weight[self._vocab :].zero_()", "pass",
        ("kernels/test_extremes.py::test_uninitialised_memory_is_never_read_with_a_top_k_teacher[bucket-torch]",),
    ),
    # groups of chunks, as on a GPU
    Mutation(
        "groups: every chunk's dlogits in the same place", _ENGINE, "slice(span.start - first, span.stop - first)",
        "slice(0, span.stop - span.start)", (_groups("no_evo-groups-bf16"),),
    ),
    Mutation("groups: the first chunk's tokens alone", _ENGINE, "hidden = chunks.student.operand(tokens)", "pass", (_groups("no_evo-groups-bf16"),)),
    Mutation(
        "groups: the factor twice", _HEAD, "elif not self._scaled and not self._at_once", "elif not self._at_once",
        (_groups("no_evo-groups-bf16"), "engines/test_gradient_groups.py::test_budget_of_groups[no_evo-bf16]"),
    ),
    Mutation(
        "groups: the factor missing in slabs", _HEAD, "total if self._scaled else total.mul_(self._scale)", "total",
        ("engines/test_gradient_groups.py::test_weights_in_another_dtype_than_the_gemm_s",),
    ),
    Mutation(
        "groups: the last slab left out", _HEAD, "range(0, self._vocab, step)", "range(0, self._vocab - step, step)",
        ("engines/test_gradient_groups.py::test_slabs_of_the_weight_gradient_cover_it",),
    ),
    Mutation(
        "filter: a bound of its own without token weights", _FILTER, "threshold = eps if", "threshold = 100 * eps if",
        ("engines/test_tile_filter.py::test_within_the_bound_and_left_out[False-fp32-skew-torch]",),
    ),
    Mutation(
        "triton: log 0 of a uniform rest", _TRITON_BLOCKS,
        "tl.maximum(tl.load(rest_ptr + row), LOG_ZERO)", "tl.load(rest_ptr + row)",
        ("kernels/test_extremes.py::test_logits_with_a_top_k_teacher[no tail-uniform-triton]",),
    ),
    Mutation(
        "filter: token weights ignored", _FILTER, "(eps * factors[rows].abs()).unsqueeze(1)", "eps",
        ("engines/test_tile_filter.py::test_products_of_what_is_left[host]",),
    ),
    Mutation(
        "filter: columns of a slab not moved", _FILTER, "part - columns.start, product", "part, product",
        ("engines/test_tile_filter.py::test_products_of_what_is_left[host]",),
    ),
    Mutation(
        "filter: a NaN left out", _FILTER_TRITON, "~((x < threshold[:, None]) | (x == 0.0))", "(x >= threshold[:, None]) & (x != 0.0)",
        ("engines/test_tile_filter.py::test_nan_is_never_left_out[device]",),
    ),
    Mutation(
        "filter: flags of other columns", _FILTER_TRITON, "slice(columns.start // self._tile,", "slice(0,",
        ("engines/test_tile_filter.py::test_products_of_what_is_left[device]",),
    ),
    Mutation(
        "hand-over: every program the same blocks", "fused_kd/engines/hand_over.py",
        "tl.program_id(0).to(tl.int64) * BLOCK", "tl.cast(0, tl.int64)",
        ("engines/test_hand_over.py::test_every_element_once",),
    ),
    Mutation(
        "plan: a group grows with the tokens", _PLAN, "if whole >= chunk:", "if True:",
        ("engines/test_gradient_groups.py::test_any_plan_covers_the_tokens_within_its_limit",),
    ),
    # bf16 products on CPUs
    Mutation(
        "native product: what an earlier slab has given is lost", f"{_CSRC}kd_gemm.h", "x->add || k);", "x->add);",
        (f"{_PRODUCTS}[size6-native]",),
    ),
    Mutation(
        "native product: an odd end takes the next line's first", f"{_CSRC}kd_gemm.h", "(k + 1 < K ? ", "(1 ? ",
        (f"{_PRODUCTS}[size2-native]",),
    ),
    Mutation(
        "native product: pairs of four lines in the wrong order", f"{_CSRC}kd_gemm.h",
        "out + (c + 4) * width, _mm512_shuffle_i32x4(odd, odd8, 0x88)",
        "out + (c + 4) * width, _mm512_shuffle_i32x4(odd8, odd, 0x88)",
        (f"{_PRODUCTS}[size4-native]",),
    ),
    Mutation(
        "native product: columns beyond the last are written", f"{_CSRC}kd_gemm.h", "left >= 16 ? 0xffff : left <= 0",
        "left >= 0 ? 0xffff : left <= 0", (f"{_PRODUCTS}[size3-native]",),
    ),
    Mutation(
        "cpu products: a result that is added to is overwritten", "fused_kd/rows/native/gemm.py",
        "out.copy_(out + result if add else result)", "out.copy_(result)",
        ("engines/test_cpu_products.py::test_a_transposed_result[native]",),
    ),
    # lists made from a head
    Mutation(
        "native largest: what leaves the list is lost", f"{_CSRC}kd_largest.h", "z[i] = left;", "z[i] = -INFINITY;",
        ("kernels/test_largest.py::test_sorted_rows[native-ascending]",),
    ),
    Mutation(
        "native largest: a bound above the k-th", f"{_CSRC}kd_largest.h", "if (above >= c->k)", "if (2 * above >= c->k)",
        ("kernels/test_largest.py::test_all_rows[native-64-fp32]",),
    ),
    Mutation(
        "triton largest: what leaves the list is lost", _LARGEST_TRITON,
        "tl.where(offsets == column, _values(least), z)", "tl.where(offsets == column, OUTSIDE, z)",
        ("kernels/test_largest.py::test_sorted_rows[triton-ascending]",),
    ),
    Mutation(
        "triton largest: the first columns listed twice", _LARGEST_TRITON, "offsets < listed", "offsets < 0",
        ("kernels/test_largest.py::test_all_rows[triton-5-fp32]",),
    ),
    Mutation(
        "torch largest: the last of equals counted too", "fused_kd/rows/torch/largest.py", "(ids <= last_index)", "(ids < last_index)",
        ("kernels/test_largest.py::test_of_equal_logits_the_lower_id_is_listed[torch-4]",),
    ),
    # mixtures of teachers
    Mutation(
        "torch mixing: sign of the share", _MIXING_TORCH, "z.add_(share - torch.exp", "z.add_(-share - torch.exp",
        ("kernels/test_mixing.py::test_teachers[torch-2-fp32]",),
    ),
    Mutation(
        "torch mixing: a row without a share changes", _MIXING_TORCH, "torch.where(none, mixed, z, out=z)", "z",
        ("kernels/test_mixing.py::test_weights_of_each_row[torch-1.0]",),
    ),
    Mutation(
        "native mixing: the share before the temperature", f"{_CSRC}kd_mixing.h",
        "(T * (share - log(of.total)))", "(share - T * log(of.total))",
        ("kernels/test_mixing.py::test_temperatures[native-0.3]",),
    ),
    Mutation(
        "native mixing: what both exclude is NaN", f"{_CSRC}kd_mixing.h",
        "low - (high == -INFINITY ? 0.0f : high)", "low - high",
        ("kernels/test_mixing.py::test_excluded_tokens[native--inf-1.0]",),
    ),
    Mutation(
        "triton mixing: the first teacher's share twice", _MIXING_TRITON,
        "tl.load(mixed + offsets)\n", "tl.load(mixed + offsets) + T * 0.6931472\n",
        ("kernels/test_mixing.py::test_teachers[triton-2-fp32]",),
    ),
    Mutation(
        "triton mixing: NaN passed over", _MIXING_TRITON,
        "high = tl.where(before > new, before, new)", "high = tl.where(new > before, new, before)",
        ("kernels/test_mixing.py::test_broken_numbers_spoil_their_row_alone[triton-1-nan]",),
    ),
    Mutation(
        "triton mixing: the logarithm of the sum left out", _MIXING_TRITON, "(share - tl.log(total))", "share",
        ("kernels/test_mixing.py::test_teachers[triton-1-fp32]",),
    ),
    Mutation(
        "lists: what top_p cuts off is lost", _LISTING, "share.masked_fill(kept, 0.0)", "(0 * share)",
        ("loss/test_top_k_of.py::test_top_p_is_the_smallest_prefix[0.3-1.0]",),
    ),
    Mutation(
        "lists: given entries stay in the rest", _LISTING, "tile.scatter_(1, columns, -math.inf)", "pass",
        ("loss/test_top_k_of.py::test_at_given_ids[torch-plain-1.0]",),
    ),
    # several teachers
    Mutation(
        "mixtures: shares instead of their logarithms", _MIXED, "shares[:, i].contiguous()", "shares[:, i].exp().contiguous()",
        (_mixture("head+capped-numbers"),),
    ),
    Mutation(
        "mixtures: each chunk has the first one's teachers", _MIXED, "self._pick(self._which[span],",
        "self._pick(self._which[: len(place.labels)],", (_in_chunks("which"),),
    ),
    Mutation(
        "mixtures: ignored tokens count in which", _MIXED, "self._which[kept], torch.ones(())",
        "self._which, torch.ones(())", (_mixture("head+capped-which"),),
    ),
    Mutation(
        "mixtures: each chunk has the first one's shares", _MIXED, "else self._shares[place.tokens]",
        "else self._shares[: len(place.labels)]", (_in_chunks("tokens"),),
    ),
    Mutation(
        "mixtures: flattened at 1", _MIXED, "logits, share, place.temperature,", "logits, share, torch.ones_like(place.temperature),",
        ("loss/test_mixtures.py::test_temperatures[torch-3.0-numbers]",),
    ),
    Mutation(
        "mixtures: a list without a share spoils the token", _MIXED, "bad |= malformed & (share > -math.inf)", "bad |= malformed",
        (_mixture("head+uniform-tokens"),),
    ),
    Mutation(
        "mixtures: lists of others' tokens are looked at", _OPS, "check_top_k(teacher, problem.labels_for(i),",
        "check_top_k(teacher, problem.labels,", (_mixture("head+uniform-which"),),
    ),
    Mutation(
        "mixtures: one buffer planned", _CHUNKS, "token += 8 * stride", "token += 4 * stride",
        ("loss/test_mixture_limits.py::test_held_is_what_the_plan_says[head+capped-fp32-None-numbers]",),
    ),
    Mutation(
        "mixed lists: an entry of two lists twice", _MIXED_LISTS, "return ids.masked_fill(again, V)", "return ids",
        (_mixed_lists("lists_alone", "uniform+uniform-numbers"),),
    ),
    Mutation(
        "mixed lists: uniform shares are not added up", _MIXED_LISTS, "where(there, own.each.unsqueeze(1))",
        "where(there, -math.inf)", (_mixed_lists("lists_alone", "uniform+uniform-numbers"),),
    ),
    Mutation(
        "mixed lists: entries beyond the shared ones are lost", _MIXED_LISTS, "return log_p, torch.logaddexp(beyond, bucket)",
        "return log_p, bucket", (_mixed_lists("buckets", "bucket:40+bucket:50-numbers"),),
    ),
    Mutation(
        "mixed lists: a bucket without a part restricts the entries", _MIXED_LISTS, "[1] | absent[:, i : i + 1], V)", "[1], V)",
        (_mixed_lists("buckets", "bucket:40+bucket:50-tokens"),),
    ),
    Mutation(
        "mixed lists: NaN of a list without a part", _MIXED_LISTS,
        "return (log_p + log_share).masked_fill(log_share == -math.inf, -math.inf)", "return log_p + log_share",
        (_mixed_lists("lists_alone", "uniform+uniform-which"),),
    ),
    # drawn lists
    Mutation(
        "draws: the k largest drawn too", _DRAWING, "tile.scatter_(1, columns.where", "torch.scatter(tile, 1, columns.where",
        ("loss/test_sample_of.py::test_right_on_average[6-1.0]",),
    ),
    Mutation(
        "draws: each tile begins anew", _DRAWING, "before[rows] += sums[:, -1]", "before[rows] += 0",
        ("loss/test_sample_of.py::test_tiles_do_not_count[None-torch]",),
    ),
    Mutation(
        "draws: the largest of the others is not counted", _DRAWING, "mass = some + found.total", "mass = found.total",
        ("loss/test_sample_of.py::test_right_on_average[6-1.0]",),
    ),
    Mutation(
        "draws: equal ones are one", "fused_kd/draws.py", "(times.double() / n)", "(times.clamp(max=1).double() / n)",
        ("loss/test_sample_of.py::test_the_k_largest_and_draws_from_the_others[torch-plain-1.0]",),
    ),
    # top-k teachers
    Mutation(
        "top-k: label's mass counted twice", _TOP_K, "each + (V - (entries < V).sum(1)).double().log()", "missing",
        ("kernels/test_lists.py::test_matrix[far-bucket-no_evo-torch]",),
    ),
    Mutation(
        "top-k: another column for the label", _TOP_K, ".to(torch.int8).argmax(1)", ".to(torch.int8).argmin(1)",
        ("kernels/test_lists.py::test_matrix[far-renormalize-no_evo-torch]",),
    ),
    Mutation(
        "top-k: no gradient for the rest", _TOP_K_TORCH, "share.mul_((gradient.rest / norm).unsqueeze(1))", "share.mul_(0.0)",
        ("kernels/test_lists.py::test_matrix[far-renormalize-no_evo-torch]",),
    ),
    Mutation(
        "top-k: duplicates unnoticed", _TOP_K, "(entries[:, 1:] == entries[:, :-1])", "(entries[:, 1:] < entries[:, :-1])",
        ("kernels/test_lists.py::test_malformed_lists_cost_nan_where_looking_would_synchronise[torch]",),
    ),
    Mutation(
        "top-k: an excluded rest's gradient to anyone", _TOP_K, "rest < LOG_ZERO / 2", "rest < LOG_ZERO * 2",
        (_infinite("torch"),),
    ),
    Mutation(
        "native top-k: an excluded rest's gradient to anyone", _NATIVE_TOP_K, "? 0.0 : scale", "? scale : scale",
        (_infinite("native"),),
    ),
    Mutation(
        "native top-k: listed tokens beside a rest of excluded ones", _NATIVE_TOP_K, "i < next; i++) buffer[indices[i] - start] = OUTSIDE", "i < next; i++) buffer[indices[i] - start] = LOG_ZERO",
        ("kernels/test_infinite_loss.py::test_a_student_that_excludes_all_is_uniform[native-bucket-1.0]",),
    ),
    Mutation(
        "native: lists exclude nothing from a head", "fused_kd/rows/native/row.py",
        "teacher = student._replace(finite=False)", "teacher = student",
        ("kernels/test_infinite_loss.py::test_a_list_that_adds_up_to_more_than_1_excludes_the_others_from_a_head_too[native]",),
    ),
    Mutation(
        "a bias excludes whatever its scale", _CHUNKS, "rounded * side.logit_scale > EXCLUDED", "rounded > EXCLUDED",
        ("kernels/test_infinite_loss.py::test_a_scale_decides_what_a_bias_excludes[native]",),
    ),
    Mutation(
        "slices: an excluded rest's gradient to anyone", _SHARDED_COLUMNS,
        "mul_(rest_gradient(gradient[:, -1:], rest))", "mul_(gradient[:, -1:])",
        (_infinite("slices"),),
    ),
    Mutation(
        "top-k: listed entries stay in the rest", _TOP_K_TRITON, '-float("inf"), z)', "z, z)",
        ("kernels/test_lists.py::test_matrix[far-bucket-no_evo-triton]",),
    ),
    Mutation(
        "top-k: the rest's origin forgotten", _TOP_K_TRITON, "((z - origin) - rest)", "(z - rest)",
        ("kernels/test_lists.py::test_matrix[far-bucket-no_evo-triton]",),
    ),
    # tails of lists
    Mutation(
        "listed: a rest in the divergence", _TOP_K, "clamp_(LOG_ZERO, LOG_ZERO)", "clamp_(0.0, 0.0)",
        (_listed_alone("torch"),),
    ),
    Mutation(
        "listed: the label joins every divergence", _TOP_K, "teacher.indices < V if spec.mixes_label else", "teacher.indices < V if True else",
        (_beside_a_list("torch"),),
    ),
    Mutation(
        "listed: a difficulty with the label", _TOP_K, "            scalars = _without_label(scalars)\n", "            pass\n",
        (_beside_a_list("torch"),),
    ),
    Mutation(
        "listed: a broken logit beside the list unnoticed", _TOP_K, "small.student.amax(1).clamp_(LOG_ZERO, LOG_ZERO)", "LOG_ZERO",
        ("kernels/test_not_numbers.py::test_nan_and_inf_make_loss_and_difficulty_nan[torch-listed-generalized_jsd]",),
    ),
    Mutation(
        "lists: the exact rest forgotten", _TOP_K, "missing = log_rest.double()", "missing = (log_rest + 1.0).double()",
        (_exact_rest("bucket"),),
    ),
    Mutation(
        "lists: the exact rest not passed on", "fused_kd/sides.py", "log_rest=log_rest", "log_rest=None", (_exact_rest("uniform"),),
    ),
    Mutation(
        "lists: the exact rest of other tokens", _CHUNKS, "of.log_rest[tokens]", "of.log_rest[: len(labels)]",
        (_exact_rest("bucket"),),
    ),
    Mutation(
        "lists: a rest at the temperature of the loss", _TOP_K, "values * temperature, rest * temperature", "values * temperature, rest",
        ("kernels/test_list_tails.py::test_a_bucket_is_the_sum_of_the_others_at_the_temperature_of_both[torch]",),
    ),
    Mutation(
        "lists: values at the temperature of the loss", _TOP_K, "values * temperature, rest * temperature", "values, rest * temperature",
        ("kernels/test_list_tails.py::test_a_uniform_tail_is_flattened_whole[torch]",),
    ),
    Mutation(
        "listed: a cross-entropy over the list", "fused_kd/terms.py", '(tail == "listed" or not temperature_is_one)', "(not temperature_is_one)",
        (_beside_a_list("native"),),
    ),
    Mutation(
        "native listed: a rest in the divergence", _NATIVE_TOP_K, "call.student.data = small->listed", "call.student.data = small->student",
        (_listed_alone("native"),),
    ),
    Mutation(
        "native listed: the label joins every divergence", _NATIVE_TOP_K, "part = j < count && (all || log_probs[j] > -INFINITY)", "part = j < count",
        (_beside_a_list("native"),),
    ),
    Mutation(
        "native listed: a difficulty with the label", _NATIVE_TOP_K, "c->lists.listed && !mixes_label(c)", "false",
        (_beside_a_list("native"),),
    ),
    Mutation(
        "native listed: a broken logit beside the list unnoticed", _NATIVE_TOP_K, "small->listed[K] = NAN", "small->listed[K] = LOG_ZERO",
        ("kernels/test_not_numbers.py::test_nan_and_inf_make_loss_and_difficulty_nan[native-listed-generalized_jsd]",),
    ),
    Mutation(
        "native listed: over the largest of all logits", _NATIVE_TOP_K, "at_least_log_zero(small->student[j] - top)", "at_least_log_zero(small->student[j] - (float)r->student.parts[0].max)",
        ("kernels/test_list_tails.py::test_a_list_far_below_the_others_keeps_its_digits[native]",),
    ),
    Mutation(
        "slices: a bucket's rest not flattened", _SHARDED_COLUMNS, "cool(rest, self.temperature, torch.empty_like(rest))", "rest",
        ("kernels/test_sharded_row.py::test_temperature[no_evo-bucket-torch]",),
    ),
    Mutation(
        "slices: a uniform tail not flattened", _SHARDED_COLUMNS,
        "Read(z, cool(z_t, T, scratch(\"z_t\", len(z)))", "Read(z, z_t if isinstance(teacher, Sparse) else cool(z_t, T, scratch(\"z_t\", len(z)))",
        ("kernels/test_sharded_row.py::test_temperature[no_evo-uniform-torch]",),
    ),
    Mutation(
        "slices listed: the label joins every divergence", _SHARDED_COLUMNS, "self._present & takes_part(teacher, shards.vocab, inputs.spec) if self._listed", "self._present if self._listed",
        (_slices("forward_kd", "listed", "torch"),),
    ),
    Mutation(
        "slices listed: a difficulty with the label", _SHARDED, "without_target=alone", "without_target=False",
        (_slices("forward_kd", "listed", "torch"),),
    ),
    Mutation(
        "slices listed: a label outside the list is excluded", _SHARDED, "(cold_label < EXCLUDED) & (cold_top >= EXCLUDED)", "label_out",
        (_slices("forward_kd", "listed", "torch"),),
    ),
    Mutation(
        "slices listed: a broken logit beside the list unnoticed", _SHARDED_COLUMNS, "[1].clamp_(1.0, 1.0)  # or NaN", "[1].fill_(1.0)",
        ("kernels/test_not_numbers.py::test_nan_and_inf_make_loss_and_difficulty_nan[slices-listed-generalized_jsd]",),
    ),
    Mutation(
        "a bucket of another temperature goes through", "fused_kd/options.py", "or temperature != taken_at)", "or temperature < taken_at)",
        ("kernels/test_list_tails.py::test_errors_of_the_loss",),
    ),
    Mutation(
        "KL(q||p) beside a label that joins the list goes through", "fused_kd/options.py", '(tail == "listed" and spec.mixes_label)', "False",
        ("kernels/test_list_tails.py::test_errors_of_the_loss",),
    ),
    Mutation(
        "lists: a rest of any shape", _INPUTS, "self.log_rest.shape != self.log_probs.shape[:-1]", "False",
        ("kernels/test_list_tails.py::test_errors_of_the_list",),
    ),
    Mutation(
        "lists: a rest above 1 goes through", _TOKENS, "out_of_range(teacher.log_rest, tail)", "out_of_range(teacher.log_rest, tail) & False",
        ("kernels/test_list_tails.py::test_errors_of_the_loss",),
    ),
    # the row in C
    Mutation(
        "native: hard and easy swapped", _NATIVE_SHARES, "default: return (float)difficulty > own->gamma", "default: return (float)difficulty <= own->gamma",
        (_logits("native", "self_evolution"),),
    ),
    Mutation(
        "native: teacher's gradient added", _NATIVE_GRADIENT, "times(e_s[i], of_s) - times(e_t[i], of_t)", "times(e_s[i], of_s) + times(e_t[i], of_t)",
        (_logits("native", "forward_kd"),),
    ),
    Mutation(
        "native: blocks' maxima not compared", _NATIVE, "r->kl[b] + t->sum * apart", "r->kl[b]",
        ("kernels/test_rows.py::test_any_vocabulary[2049-no_evo-native]",),
    ),
    Mutation(
        "native: listed entries stay in the rest", _NATIVE_TOP_K, "i < next; i++) buffer[indices[i] - start] = OUTSIDE", "i < next; i++) buffer[indices[i] - start] = 0.0f",
        ("kernels/test_lists.py::test_matrix[far-bucket-no_evo-native]",),
    ),
    Mutation(
        "native: no gradient for the rest", _NATIVE_TOP_K, "out[i] = share * e_s[i]", "out[i] = 0.0f * e_s[i]",
        ("kernels/test_lists.py::test_matrix[far-renormalize-no_evo-native]",),
    ),
    Mutation(
        "native: cold labels share the rest's temperature", _NATIVE_TOP_K, "log_sum(&r->cold, 1.0, origin)", "log_sum(&r->student, 1.0, origin)",
        ("kernels/test_lists.py::test_temperature[2.0-forward_kd-native]",),
    ),
    Mutation(
        "native: uniform tail of another row", _NATIVE_CALL, "c->lists.rest[row]", "c->lists.rest[0]",
        ("kernels/test_lists.py::test_matrix[far-uniform-no_evo-native]",),
    ),
    # the streaming engine
    Mutation(
        "streaming: a short last group takes tiles of another", _STREAMING_TILES, "part = place // size", "part = place // GROUP",
        ("engines/test_streaming.py::test_every_tile_is_made_once_group_after_group[7-5-3]",),
    ),
    Mutation(
        "streaming: groups overlap", _STREAMING_TILES, "started // (GROUP * parts) * GROUP", "started // (GROUP * parts)",
        ("engines/test_streaming.py::test_every_tile_is_made_once_group_after_group[7-5-3]",),
    ),
    Mutation(
        "streaming: a tile's flag at another's place", _STREAMING_GRADIENT,
        "flags_ptr + block * tl.num_programs(1) + part", "flags_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)",
        ("engines/test_streaming.py::test_filter_skips_tiles_within_its_bound[sft-fp32-one_slab]",),
    ),
    Mutation(
        "streaming: splits end early", _STREAMING_SWEEPS,
        "_cdiv(_cdiv(self._vocab, tiles.columns), splits)", "_cdiv(_cdiv(self._vocab, tiles.columns), splits + 1)",
        ("engines/test_streaming.py::test_temperature_bias_scale_softcap_and_vocab_size[skew]",),
    ),
    Mutation(
        "streaming: joined dH of the last slab alone", _STREAMING,
        "head.weight_operand(columns), None, first=columns.start == 0)", "head.weight_operand(columns), None, first=True)",
        ("engines/test_streaming.py::test_both_gradients_from_the_same_dlogits[sft]",),
    ),
    # teachers of another vocabulary, and lists that a loss chooses
    Mutation(
        "map: the first column stands for none", _MAPPING, "out.index_fill_(1, unmapped, -math.inf)", "pass",
        (_map("two tokenizers", "renormalize"),),
    ),
    Mutation(
        "map: mapped columns are of the rest too", _MAPPING, "z.index_fill_(1, tile.places, -math.inf)", "pass",
        (_map("a draft", "bucket"),),
    ),
    Mutation(
        "map: the rest's share of no column", _MAPPING, "each = rest - math.log(len(unmapped))", "each = rest",
        (_map("two tokenizers", "uniform"),),
    ),
    Mutation(
        "map: the rest at temperature 1", _MAPPING, "(others.top - origin) + others.total.log() * temperature",
        "(others.top - origin) + others.total.log()", ("loss/test_maps.py::test_temperatures[torch-bucket-no_evo]",),
    ),
    Mutation(
        "map: the teacher's offset stays", _MAPPING, "out.sub_(origin.unsqueeze(1))", "pass",
        (_map("two tokenizers", "bucket"),),
    ),
    Mutation(
        "map: a list of rows in the order of the student", _MAPPING, "host[own].clamp(min=0).to(device)",
        "host[own].sort().values.clamp(min=0).to(device)", ("loss/test_maps.py::test_pieces_cover_a_map",),
    ),
    Mutation(
        "map: looked at once for good", _MAPPING, "or (on_cpu and not torch.equal(known[1], columns))", "",
        ("loss/test_maps.py::test_a_map_is_looked_at_once_and_again_where_it_changes",),
    ),
    Mutation(
        "mapped: a label that is not mapped stays in the rest", _MAPPED, "(unmapped == label) & inputs.spec.reads_label",
        "(unmapped == label) & False", (_map("two tokenizers", "bucket"),),
    ),
    Mutation(
        "mapped: the label's share is the rest's too", _MAPPED, "torch.where(alone, others + left, others)", "others",
        (_map("one unmapped", "bucket"),),
    ),
    Mutation(
        "mapped: the rest's gradient for nobody", _MAPPED, "out.index_add_(1, unmapped, share)", "pass",
        (_map("two tokenizers", "bucket"),),
    ),
    Mutation(
        "mapped: the label of a cross-entropy joins the list", _MAPPED, "if not spec.mixes_label:", "if False:",
        (_map("two tokenizers", "listed"),),
    ),
    Mutation(
        "mapped: the cold rest's gradient for nobody", _MAPPED, "share.addcmul_(cold_share, gradient.cold.unsqueeze(1))", "pass",
        ("loss/test_maps.py::test_temperatures[torch-bucket-forward_kd]",),
    ),
    Mutation(
        "lists: chosen by the teacher whoever chooses", _CHOOSING, "by = student if listing.of_student else teacher", "by = teacher",
        ("loss/test_chosen_lists.py::test_equals_the_oracle[student-bucket-torch]",),
    ),
    Mutation(
        "lists: the teacher's entries are of its rest too", _CHOOSING, "z.scatter_(1, index, -math.inf)", "pass",
        ("loss/test_chosen_lists.py::test_equals_the_oracle[student-bucket-torch]",),
    ),
    Mutation(
        "lists: the user's logits are written over", _CHOOSING, "teacher.raw.float().clone()", "teacher.raw.float()",
        ("loss/test_chosen_lists.py::test_logits_scales_caps_and_a_small_vocabulary[student]",),
    ),
    Mutation(
        "lists: what the teacher excludes is not listed", _CHOOSING, ".clamp(min=LOG_ZERO).where(there, -math.inf)",
        ".where(there, -math.inf)", ("loss/test_chosen_lists.py::test_an_entry_that_the_teacher_excludes_stays_listed[bucket-the loss]",),
    ),
    Mutation(
        "lists: a list of nothing but excluded entries is uniform", _TOP_K, "bad |= (values < EXCLUDED).all(1)", "pass",
        ("loss/test_chosen_lists.py::test_a_teacher_that_excludes_all_that_is_listed",),
    ),
    Mutation(
        "map: a teacher that excludes all of it is uniform", _MAPPING, "bad = out.amax(1) < EXCLUDED", "pass",
        ("loss/test_maps.py::test_a_teacher_that_excludes_all_that_is_mapped[renormalize]",),
    ),
    Mutation(
        "objectives: a label without a share is read", "fused_kd/objectives/self_evolution.py", "if is_number(lam, 1.0) else kind",
        "if False else kind", ("loss/test_chosen_lists.py::test_a_label_without_a_part_in_the_loss_changes_nothing[forward_kd]",),
    ),
    # what stands around a call, or beside a row
    Mutation(
        "loss: a factor in the default dtype", _TOKENS, "scale = torch.full((), 1.0 / float(number), dtype=torch.float32, ",
        "scale = torch.full((), 1.0 / float(number), ", ("kernels/test_ambient.py::test_default_dtype[bf16-logits-native]",),
    ),
    Mutation(
        "torch: far rows told by the smallest logit", _TORCH, "z.amax(1, keepdim=True), z_t.amax(1, keepdim=True)",
        "z.amin(1, keepdim=True), z_t.amin(1, keepdim=True)",
        ("kernels/test_ambient.py::test_an_offset_of_a_row_whose_label_both_exclude[100000.0-torch]",),
    ),
    Mutation(
        "torch: an empty list excludes the last token", _TORCH_MATH, "torch.where(some, values.gather(1, first), each)",
        "values.gather(1, first)", ("kernels/test_ambient.py::test_an_empty_list_is_uniform[uniform-torch]",),
    ),
    Mutation(
        "head: exclusions of the bias as given", _CHUNKS, "known_all(rounded * side.logit_scale > EXCLUDED)", "known_all(bias.isfinite())",
        ("kernels/test_ambient.py::test_a_bias_that_excludes_only_when_rounded[native]",),
    ),
    Mutation(
        "ops: weight 0 hides NaN", _OPS, "(weights == 0) & (loss == math.inf)", "weights == 0",
        ("kernels/test_ambient.py::test_weight_0_does_not_hide_nan[torch]",),
    ),
    Mutation(
        "ranking: a millionth too few", _PROBLEM, "fraction * (1 - 2**-24)", "fraction * (1 - 1e-6)",
        ("kernels/test_ambient.py::test_the_most_difficult_are_as_many_as_said",),
    ),
    # autograd and options
    Mutation(
        "ops: second backward scaled twice", _OPS, "gradients, ctx.ready = ctx.ready, None", "gradients = ctx.ready",
        ("kernels/test_training.py::test_second_backward_repeats_the_first[dense-torch]",),
    ),
    Mutation(
        "ops: upstream gradient ignored", _OPS, "gradient.mul_(factor)", "gradient.mul_(1.0)",
        ("loss/test_loss.py::test_reductions_with_any_upstream_gradient[-mean-torch]",),
    ),
    Mutation(
        "ops: second derivative not refused", _OPS, "if torch.is_grad_enabled() and not", "if False and not",
        ("kernels/test_training.py::test_second_derivatives_and_function_transforms_are_refused[dense-torch-mean]",),
    ),
    Mutation(
        "loss: num_items ignored", _TOKENS, "1.0 / float(number)", "1.0 / labels.numel()",
        ("kernels/test_training.py::test_accumulation_with_num_items_is_one_big_batch[dense-torch-forward_kd]",),
    ),
    Mutation(
        "loss: shifted by two", _INPUTS, "labels[..., 1:], torch.full_like(labels[..., :1]",
        "labels[..., 2:], torch.full_like(labels[..., :2]", ("loss/test_loss.py::test_shift_aligns_next_token_labels",),
    ),
    Mutation(
        "loss: weighted mean by the count", _TOKENS, "else weights.sum()", "else valid.sum()",
        ("loss/test_loss.py::test_reductions_with_any_upstream_gradient[weighted-mean-torch]",),
    ),
    Mutation(
        "loss: weights of ignored tokens are read", _TOKENS, ".masked_fill(~valid.to(device, non_blocking=True), 0.0)", "",
        ("loss/test_amounts.py::test_weights_of_ignored_tokens_are_not_read",),
    ),
]  # fmt: skip
