# ruff: noqa: E501 (one row of the table is one line)
"""Bugs planted in gptlib, each of which the ordinary tests must catch.

A row of the table says: in this module, replace this text by that one; then these tests
must fail. A bug that nobody notices is a test that is missing.

The work is done by a process of its own, `python tests/test_planted_bugs.py`, so that
torch is imported once. It forks a child for each bug. The child forgets gptlib and the
tests, imports gptlib anew with the changed text, so that every module has the changed
names, and runs pytest. Only pytest's exit status 1, "tests failed", counts as caught;
a test that cannot be collected or is not there is a mistake of the table. A last child
plants nothing: all the tests of the table must pass in it.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest


TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
LIMIT = 60  # seconds for one child; a bug may make a loop endless


@dataclass(frozen=True)
class Bug:
    """name: what is wrong; old, new: the texts, or tuples of as many texts each."""

    name: str
    module: str  # below gptlib
    old: str | tuple[str, ...]
    new: str | tuple[str, ...]
    caught_by: str  # names of tests, `file::test` without `test_`, separated by spaces

    @property
    def node_ids(self) -> list[str]:
        parts = [node.split("::") for node in self.caught_by.split()]
        return [f"tests/test_{file}.py::test_{test}" for file, test in parts]

    @property
    def path(self) -> Path:
        return ROOT / "gptlib" / (self.module.replace(".", "/") + ".py")

    def planted(self) -> str:
        """The module's text with the bug in it."""
        text = self.path.read_text(encoding="utf-8")
        old, new = self.old, self.new
        if isinstance(old, str):
            old, new = (old,), (new,)
        for a, b in zip(old, new, strict=True):
            if text.count(a) != 1:
                raise LookupError(f"{a!r} occurs {text.count(a)} times, not once")
            text = text.replace(a, b)
        compile(text, str(self.path), "exec")
        return text


LOOP = "attention::attention_is_its_definition"
HEADS = "attention::heads_equal_a_loop_over_heads"
BLOCK = "attention::a_block_normalises_first_and_adds_to_the_stream"
DROPPED = "attention::dropout_in_training_and_none_in_evaluation"
BEGINS = "model::every_parameter_begins_as_in_gpt2"
STATE = "training::a_state_gives_back_every_part_of_it"
MEAN = "training::the_gradient_is_that_of_the_mean_loss_of_the_whole_batch"
CACHED = "sampling::cached_equals_uncached_beyond_the_block"
KEPT = "sampling::top_k_and_top_p"
RATES = "objective::every_schedule_stays_between_and_ends"
UNSCALED = "state.scaler.unscale_(state.optimizer)"
CLIP = "norm = nn.utils.clip_grad_norm_("

BUGS = [
    # attention
    Bug("scale d instead of sqrt(d)", "attention", "math.sqrt(q.shape[-1])", "q.shape[-1]", LOOP),
    Bug("scale forgotten in the fused kernel", "attention", "is_causal=square\n", "is_causal=square, scale=1.0\n", LOOP),
    Bug("no mask", "attention", "is_causal=square\n", "is_causal=False\n", "model::no_logit_depends_on_a_later_token"),
    Bug("mask on the wrong diagonal with a cache", "attention", ".tril(S - T)", ".tril()", "sampling::cache_in_any_pieces"),
    Bug("mask lets one future token in", "attention", ".tril(S - T)", ".tril(S - T + 1)", LOOP),
    Bug("softmax over the queries", "attention", ".softmax(dim=-1)", ".softmax(dim=-2)", LOOP),
    Bug("no dropout of weights", "attention", "dropout_p=dropout", "dropout_p=0.0", "attention::dropout_takes_weights_away_and_keeps_their_mean"),
    Bug("influence sums over channels", "attention", ".amax(dim=(1, 3))", ".sum(dim=(1, 3))", "attention::influence_is_the_largest_slope"),
    # heads
    Bug("heads joined without the transposition", "multi_head", "y.transpose(1, 2).reshape", "y.reshape", HEADS),
    Bug("heads cut from positions", "multi_head", "z.view(shape).transpose(1, 2)", "z.reshape(B, self.n_head, T, -1)", HEADS),
    Bug("c_proj missing", "multi_head", "self.c_proj(y)", "y", HEADS),
    Bug("queries and keys swapped", "multi_head", "        q, k, v = self.c_attn", "        k, q, v = self.c_attn", HEADS),
    Bug("cache not read", "multi_head", "k, v = cache.update(k, v)", "cache.update(k, v)", "attention::a_cache_gets_the_new_keys_and_gives_all"),
    Bug("dropout of weights in evaluation", "multi_head", " if self.training else 0.0", "", DROPPED),
    Bug("no dropout of the output", "multi_head", "self.resid_dropout(self.c_proj(y))", "self.c_proj(y)", DROPPED),
    # block
    Bug("residual forgotten", "block", "x = x + self.attn(", "x = self.attn(", BLOCK),
    Bug("norm after attention", "block", "self.attn(self.ln_1(x), cache)", "self.ln_1(self.attn(x, cache))", BLOCK),
    Bug("first norm used twice", "block", "self.mlp(self.ln_2(x))", "self.mlp(self.ln_1(x))", BLOCK),
    Bug("activation setting ignored", "block", "approximate=ACTIVATIONS[activation]", "", "attention::the_mlp_is_its_formula"),
    Bug("no dropout in the MLP", "block", "self.dropout(self.c_proj(", "(self.c_proj(", DROPPED),
    # model
    Bug("weight tying broken in the gradient", "gpt", "F.linear(hidden, self.head_weight)", "F.linear(hidden, self.head_weight.detach())", "model::the_gradient_is_the_slope_of_the_loss"),
    Bug("projections start as wide as the rest", "gpt", "std=0.02 / math.sqrt(2 * c.n_layer)", "std=0.02", BEGINS),
    Bug("projections scaled by layers, not by twice", "gpt", "math.sqrt(2 * c.n_layer)", "math.sqrt(c.n_layer)", BEGINS),
    Bug("biases start at 1", "gpt", "nn.init.zeros_(module.bias)", "nn.init.ones_(module.bias)", BEGINS),
    Bug("positions forgotten", "gpt", "x + self.wpe.weight[start:stop]", "x", "model::no_logit_depends_on_a_later_token model::what_enters_the_blocks_is_dropped_in_training"),
    Bug("positions from 0 with a cache", "gpt", "self.wpe.weight[start:stop]", "self.wpe.weight[: stop - start]", CACHED),
    Bug("all layers share a cache", "gpt", "cache.layers[i]", "cache.layers[0]", "sampling::cache_in_any_pieces"),
    Bug("last norm forgotten", "gpt", "return self.ln_f(x)", "return x", "model::no_logit_depends_on_a_later_token model::logits_equal_transformers"),
    Bug("no dropout of embeddings", "gpt", "        x = self.drop(x)\n", "", "model::what_enters_the_blocks_is_dropped_in_training"),
    # decoder
    Bug("values rotated too", "decoder", "q, k = rotate(q, cos, sin), rotate(k, cos, sin)", "q, k, v = (rotate(z, cos, sin) for z in (q, k, v))", "decoder::values_stay_as_they_are"),
    Bug("a cached key rotated by position 0", "decoder", "self.cos[start : start + T], self.sin[start : start + T]", "self.cos[:T], self.sin[:T]", "decoder::a_cached_key_has_its_own_angle"),
    Bug("RMS over the wrong axis", "decoder", "return nn.RMSNorm(self.n_embd, eps=self.norm_eps)", "return nn.LayerNorm(self.n_embd, eps=self.norm_eps, bias=False)", "decoder::swiglu_and_rms_are_their_formulas"),
    Bug("heads of keys repeated in the wrong order", "decoder", "z.repeat_interleave(self.group, dim=1)", "z.repeat(1, self.group, 1, 1)", "decoder::grouped_heads_equal_heads_with_repeated_rows"),
    Bug("slopes of ALiBi with the wrong sign", "decoder", "bias = -slopes[", "bias = slopes[", "decoder::alibi_slopes_and_bias"),
    Bug("slopes of the next power in order", "decoder", "-4 * (2 * i + 1) / power", "-4 * (i + 1) / power", "decoder::alibi_slopes_and_bias"),
    Bug("gate and value exchanged", "decoder", "gate, value = self.c_fc", "value, gate = self.c_fc", "decoder::swiglu_and_rms_are_their_formulas"),
    Bug("a layout of neighbours read as halves", "decoder", "return pairs.transpose(1, 2).reshape(weight.shape)", "return weight", "decoder::the_layouts_are_inverse_and_rotate_alike"),
    Bug("pairs of neighbours rotated as halves", "decoder", "turned = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)", "turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)", "decoder::the_layouts_are_inverse_and_rotate_alike"),
    Bug("fast pairs scaled, slow ones kept", "decoder", "kept * speeds + (1 - kept) * speeds / factor", "(1 - kept) * speeds + kept * speeds / factor", "decoder::scaled_angles"),
    Bug("BLOOM's heads read part by part", "workshop.families", "value.unflatten(0, (n_head, 3, -1))", "value.unflatten(0, (3, n_head, -1))", "families::blooms_rows_are_put_in_order_and_back"),
    # objective
    Bug("perplexity to base 2", "objective", "return math.exp(loss)", "return 2**loss", "objective::units"),
    Bug("nats called bits", "objective", " / math.log(2) / text_bytes", " / text_bytes", "objective::units"),
    Bug("vectors decay", "objective", '"weight_decay": 0.0', '"weight_decay": weight_decay', "objective::a_step_with_zero_gradient_decays_matrices_and_spares_vectors"),
    Bug("Muon without decay", "objective", "Muon(inner, weight_decay)", "Muon(inner, 0.0)", "objective::a_step_with_zero_gradient_decays_matrices_and_spares_vectors"),
    Bug("betas of AdamW ignored", "objective", "return torch.optim.AdamW(groups, lr=0.0, betas=betas", "return torch.optim.AdamW(groups, lr=0.0", "objective::the_settings_reach_the_optimiser"),
    Bug("warm-up begins at 0", "objective", "(step + 1) / warmup_steps\n    if", "step / warmup_steps\n    if", RATES),
    Bug("cosine climbs again after decay_steps", "objective", "if step >= decay_steps", "if step > 10 * decay_steps", RATES),
    Bug("trapezoid ends a step early", "objective", "steps - step)", "steps - step - 1)", "objective::trapezoid_corners"),
    Bug("moments of one optimiser not restored", "objective", "part.load_state_dict(its_state)", "pass", "objective::combined_state_comes_back"),
    # batches
    Bug("targets not shifted", "batches", "tokens[:, 1:]", "tokens[:, :-1]", "batches::targets_are_the_inputs_moved_on_by_one"),
    Bug("ids above 32,767 turn negative", "batches", "windows.astype(np.int64)", "windows.astype(np.int16).astype(np.int64)", "batches::targets_are_the_inputs_moved_on_by_one"),
    Bug("last crop never drawn", "batches", "len(self.ids) - self.block_size\n", "len(self.ids) - self.block_size - 1\n", "batches::last_token_is_reached_and_nothing_beyond"),
    Bug("every step draws the same crops", "batches", "np.array([seed, step]", "np.array([seed, 0]", "batches::offsets_ignore_all_other_random_state"),
    Bug("every process reads the same crops", "batches", "first, stride = rank *", "first, stride = 0 *", "batches::batch_does_not_depend_on_micro_batch_or_world_size"),
    Bug("a mark's own window given to the document before", "batches", 'side="right"', 'side="left"', "batches::with_a_mark_a_window_begins_where_its_document_does"),
    Bug("text before the first mark never read", "batches", "np.union1d([0], ", "np.union1d([], ", "batches::with_a_mark_a_window_begins_where_its_document_does"),
    Bug("last pair dropped", "batches", "        ahead = batch\n    if ahead is not None", "        ahead = batch\n    if False", "batches::to_device_keeps_order_and_stays_one_ahead"),
    # training
    Bug("accumulation adds instead of averaging", "training", "module(*batch) / n ", "module(*batch) ", MEAN),
    Bug("loss of the last micro-batch logged", "training", "loss += part.detach()", "loss = part.detach() * n", MEAN),
    Bug("gradients kept for the next step", "training", "state.optimizer.zero_grad(set_to_none=True)", "pass", "training::gradients_do_not_carry_over_to_the_next_step"),
    Bug("clipping before unscaling", "training", UNSCALED, "pass", "training::scaling_the_loss_changes_neither_steps_nor_logged_norms"),
    Bug("clipping after the step", "training", ("state.scaler.step(state.optimizer)", CLIP), ("pass", "state.scaler.step(state.optimizer)\n    " + CLIP), "training::clipping_shortens_the_true_gradient_and_logs_its_length"),
    Bug("grad_clip 0 stops the training", "training", "config.grad_clip or math.inf", "config.grad_clip", "training::grad_clip_0_is_off"),
    Bug("rate of the next step", "training", "config.rate(state.step)", "config.rate(state.step + 1)", "training::the_rate_of_each_step_reaches_every_group"),
    Bug("training in evaluation mode", "training", "state.model.train()", "state.model.eval()", "training::training_is_in_training_mode_and_evaluation_is_not"),
    Bug("evaluation in training mode", "training", "module.eval()", "module.train()", "training::training_is_in_training_mode_and_evaluation_is_not"),
    Bug("evaluation ends the training mode", "training", "module.train(was_training)", "pass", "training::training_is_in_training_mode_and_evaluation_is_not"),
    Bug("evaluation reads a training step's crops", "training", "EVAL_STEP = 2**63", "EVAL_STEP = 7", "training::evaluation_weighs_unequal_groups_and_draws_nothing"),
    Bug("small groups weigh as much as large ones", "training", "* len(batch[0])", "* micro_batch_size", "training::evaluation_weighs_unequal_groups_and_draws_nothing"),
    Bug("resuming without the optimiser", "training", '("model", "optimizer", "scaler")', '("model", "scaler")', STATE),
    Bug("resuming without the scaler", "training", '("model", "optimizer", "scaler")', '("model", "optimizer")', STATE),
    Bug("resuming without the step", "training", 'COUNTERS = ("step", ', "COUNTERS = (", STATE),
    Bug("resuming without the best loss", "training", '"best", "best_step"', '"best_step"', STATE),
    Bug("one dropout mask for all micro-batches", "training", "{step} {micro_batch} {rank}", "{step} {rank}", "training::dropout_depends_on_the_place_alone"),
    Bug("gradients exchanged too early", "training", "last=i == n - 1", "last=i == 0", "training::only_the_last_micro_batch_of_a_step_exchanges_gradients"),
    Bug("bf16 asked for and not used", "training", 'if self.name == "fp32"', "if True", "training::bf16_multiplies_in_16_bits_and_keeps_weights_in_32"),
    Bug("zero_projections ignored", "training", "if config.zero_projections", "if False", "training::zero_projections_make_every_block_the_identity"),
    # sampling
    Bug("cache writes over itself", "sampling", "self.length = end", "self.length = T", "sampling::cache_in_any_pieces"),
    Bug("first position read, not the last", "sampling", "model.head(x[:, -1])", "model.head(x[:, 0])", "sampling::greedy_is_the_argmax_of_the_whole_text"),
    Bug("temperature multiplied", "sampling", "(logits - best) / temperature", "(logits - best) * temperature", "sampling::draws_follow_the_softmax"),
    Bug("top-k keeps one more", "sampling", "min(top_k or n, n)", "min((top_k or n) + 1, n)", KEPT),
    Bug("top-p drops the first token", "sampling", "kept.cumsum(-1) - kept", "kept.cumsum(-1)", KEPT),
    Bug("one padded id is drawn", "sampling", "[..., :n_vocab]", "[..., : n_vocab and n_vocab + 1]", "sampling::padded_ids_are_never_drawn"),
    Bug("a probability of 0 is drawn", "sampling", "right=True", "right=False", "sampling::draw_at_both_ends"),
    Bug("dropout while sampling", "sampling", "model.eval()", "model.train()", "sampling::dropout_is_off_and_the_mode_comes_back"),
    Bug("stopped rows go on", "sampling", "torch.where(stopped, tokens[:, -1:], new.to(tokens.device))", "new", "sampling::a_row_that_stopped_repeats_its_stop_and_the_others_go_on"),
    # evaluation
    Bug("tokens scored twice", "evaluation", "yield start, stop, scored\n", "yield start, stop, start + 1\n", "evaluation::windows_cover_every_target_exactly_once"),
    Bug("bootstrap over tokens", "evaluation", "        rng = np.random.default_rng(seed)", "        nats, tokens = np.repeat(nats / tokens, tokens), np.ones(tokens.sum())\n        rng = np.random.default_rng(seed)", "evaluation::interval_contains_the_mean_and_is_seeded"),
    Bug("marks scored as text", "evaluation", "losses[a : b - 2]", "losses[a : b - 1]", "evaluation::each_document_gets_its_own_losses_and_units"),
    Bug("token losses in training mode", "evaluation", "model.eval()", "model.train()", "evaluation::training_mode_and_dropout_are_handled"),
    Bug("words counted without line ends", "evaluation", 'words=counted["words"] + counted["lines"]', 'words=counted["words"]', "evaluation::line_ends_come_from_the_record_or_the_text"),
    # speed
    Bug("chunked gradient not divided", "speed", "grad = grad / ctx.positions", "grad = grad + 0", "speed::equal_to_plain_loss_in_fp32"),
    Bug("chunked loss not divided", "speed", "return loss / N", "return loss", "speed::equal_to_plain_loss_in_fp32"),
    Bug("a repeated target counts once", "speed", "ones, accumulate=True", "ones, accumulate=False", "speed::equal_to_plain_loss_in_fp32"),
    Bug("targets forgotten below the head", "speed", "grad_hidden -= weight[targets]", "grad_hidden -= 0", "speed::equal_to_plain_loss_in_fp32"),
    Bug("only the last chunk reaches the head", "speed", "total.addmm_(probs.T, hidden)", "total.copy_(probs.T @ hidden)", "speed::equal_to_plain_loss_in_fp32"),
    # exchange
    Bug("another GELU in the exported model", "exchange", '"gelu_tanh": "gelu_new"', '"gelu_tanh": "gelu"', "model::logits_equal_transformers"),
    Bug("square matrices not transposed", "exchange", "turned = value.T if name.endswith(LINEAR)", "turned = value.T if name.endswith(LINEAR) and len(value) != len(value.T)", "model::logits_equal_transformers"),
    Bug("rows left in pairs of halves", "workshop.gguf_files", "part = neighbours_from_halves(part, len(part) // config.head_width)", "pass", "gguf::every_tensor_is_read_back gguf::neighbours_turned_by_the_files_angles_score_as_ours"),
    Bug("keys turned in the groups of queries", "workshop.gguf_files", "len(part) // config.head_width)", "config.n_head)", "gguf::every_tensor_is_read_back"),
    Bug("divisors of angles upside down", "workshop.gguf_files", "(plain / slower)", "(slower / plain)", "gguf::neighbours_turned_by_the_files_angles_score_as_ours"),
    Bug("linear scaling not written", "workshop.gguf_files", 'c.rope_scaling == "linear"', "False", "gguf::the_shape_is_written gguf::neighbours_turned_by_the_files_angles_score_as_ours"),
    Bug("no zeros for missing biases", "workshop.gguf_files", 'if kind == "gpt2":\n        for name', 'if kind == "none":\n        for name', "gguf::every_tensor_is_read_back"),
    Bug("rows of padding written", "workshop.gguf_files", "value = value[:n_vocab]", "pass", "gguf::every_tensor_is_read_back gguf::every_token_and_merge_is_read_back"),
    Bug("positions rounded", "workshop.gguf_files", ' or name == "position_embd.weight"', "", "gguf::smaller_types_round_and_no_more"),
    Bug("the mark is an ordinary token", "workshop.gguf_files", "+ [CONTROL]", "+ [NORMAL]", "gguf::every_token_and_merge_is_read_back"),
    Bug("no mark before a text", "workshop.gguf_files", '"add_bos_token": True', '"add_bos_token": False', "gguf::every_token_and_merge_is_read_back"),
    Bug("another model's rule for words", "workshop.gguf_files", '("digits", "words"): "smollm"', '("digits", "words"): "gpt-2"', "gguf::another_models_tokenizer_is_read_back"),
    Bug("an existing file overwritten", "workshop.gguf_files", "if out.exists():", "if False:", "gguf::an_existing_file_stays"),
    Bug("written in its place", "workshop.gguf_files", "part = Path(folder) / out.name", "part = out", "gguf::a_write_that_fails_leaves_nothing"),
    Bug("one scale for a matrix", "workshop.int8", "weight.abs().amax(1)", "weight.abs().amax().repeat(len(weight))", "int8::no_weight_moves_by_more_than_half_a_scale_of_its_row"),
    Bug("a bias lost in 8 bits", "workshop.int8", "linear_prepack(stored, bias)", "linear_prepack(stored, None)", "int8::the_bias_is_added_in_full"),
    Bug("8 bits trusted unseen", "workshop.int8", " if trusted else model", "", "int8::a_machine_that_cannot_keeps_its_model"),
    Bug("8 bits seed the user's numbers", "workshop.int8", "torch.random.fork_rng([])", "torch.random.fork_rng([], enabled=False)", "int8::the_users_random_numbers_are_left_alone"),
    # tokenizer and corpus
    Bug("last merge first", "tokenizer", "key=lambda token: ranks.get(token, math.inf)", "key=lambda token: -ranks.get(token, -math.inf)", "tokenizer::random_vocabularies_agree_with_tiktoken"),
    Bug("outdated counts decide a merge", "tokenizer", "if self.counts[pair] == -negated:", "if True:", "tokenizer::the_trainer_equals_its_definition"),
    Bug("held-out documents trained on too", "corpus", "if (document % HELD_OUT == 0) == validation", "if not validation or document % HELD_OUT == 0", "token_files::a_split_held_out_by_rule_stands_in_the_manifest"),
    Bug("splits of a text overlap", "corpus", "for share in (0.90, 0.95)", "for share in (0.90, 0.90)", "corpus::text_file_loses_nothing corpus::a_text_file_is_cut_in_90_5_and_5_per_cent"),
    # workshop
    Bug("end-of-text missing", "workshop.token_files", "mark * piece.starts + ids", "ids", "token_files::round_trip"),
    Bug("token file in the other byte order", "workshop.token_files", 'ids.astype(kind)', 'ids.astype(">u2")', "token_files::round_trip"),
    Bug("altered token file accepted", "workshop.token_files", "if verify or path", "if verify and path", "token_files::every_altered_byte_is_found"),
    Bug("write_whole without a rename", "workshop.files", 'temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")', "temporary = path", "files::a_failed_write_leaves_the_old_file_and_nothing_else"),
    Bug("write_whole without fsync", "workshop.files", "os.fsync(raw.fileno())", "pass", "files::data_reach_the_disk_before_the_name_does"),
    Bug("hash of a checkpoint not checked", "workshop.checkpoints", "if found != digest:", "if False:", "checkpoints::a_damaged_checkpoint_gives_way_and_is_set_aside"),
    Bug("best checkpoint deleted", "workshop.checkpoints", "{*steps[-self.keep :], self.best()}", "{*steps[-self.keep :]}", "checkpoints::the_last_and_the_best_are_kept_and_nothing_else"),
    Bug("oldest checkpoint taken up", "workshop.checkpoints", "for step in reversed(steps)", "for step in steps", "checkpoints::a_damaged_checkpoint_gives_way_and_is_set_aside"),
    Bug("loss added over processes, not averaged", "workshop.distribution", "value / self.size", "value", "distribution::several_processes_average_and_vote"),
    Bug("validation loss of the training split", "workshop.runs", 'tokens.split(name).ids', 'tokens.split("train").ids', "runs::the_validation_loss_is_that_of_the_validation_split"),
    Bug("worst checkpoint called the best", "workshop.runs", "loss < state.best", "not loss < state.best", "run_folders::the_best_or_the_last_is_loaded_without_the_optimiser"),
    # fine-tuning
    Bug("loss on the prompt", "finetuning", '[message["role"] == "assistant"]', "[True]", "finetuning::the_answers_and_their_ends_are_learned_and_nothing_else"),
    Bug("no end of turn", "finetuning", '[*tokenizer.encode(" " + message["content"]), marks["end"]]', 'tokenizer.encode(" " + message["content"])', "finetuning::the_end_of_the_turn_is_learned"),
    Bug("mask off by one at the answer", "finetuning", "weights[:, 1:]", "weights[:, :-1]", "finetuning::the_first_token_of_an_answer_is_predicted_from_its_mark"),
    Bug("a mean over nothing", "finetuning", "return losses @ weights[counted]", "return losses @ weights[counted] / counted.sum()", "finetuning::a_micro_batch_without_a_target_is_zero_and_not_nan"),
    Bug("a mean of the micro-batches' means", "finetuning", "self.batch_size / (len(group) * total)", "1 / sum(sum(learned) for _, learned in group)", "finetuning::a_step_is_the_mean_over_its_answer_tokens_for_any_micro_batch"),
    Bug("conversations in one row see each other", "finetuning", "model.hidden(tokens)[counted]", "model.hidden(tokens.reshape(1, -1)).view(*tokens.shape, -1)[counted]", "finetuning::padded_together_equals_one_by_one"),
    Bug("every process reads the same conversations", "finetuning", "first, stride = rank *", "first, stride = 0 *", "finetuning::processes_share_the_conversations_of_a_step"),
    Bug("a schedule that never moves", "training", "config.rate(state.step)", "config.rate(0)", "finetuning::the_rate_moves"),
    Bug("alpha without the division by the rank", "lora", "self.alpha, self.scale = alpha, alpha / rank", "self.alpha, self.scale = alpha, alpha", "lora::alpha_is_divided_by_the_rank[2]"),
    Bug("A and B both begin at zero", "lora", "uniform_(-bound, bound, generator=generator)", "zero_()", "lora::at_the_start_it_is_the_base_bit_for_bit_and_something_can_move"),
    Bug("the base trains too", "lora", "model.requires_grad_(False)", "pass", "lora::only_the_adapters_train"),
    Bug("merged twice", "lora", "for layer in unmerged(model).values():\n        layer.kept", "for layer in adapters(model).values():\n        layer.kept", "lora::merging_twice_is_refused"),
    Bug("unmerged by subtraction", "lora", "layer.weight.copy_(layer.kept)", "layer.weight -= layer.change()", "lora::merged_equals_unmerged_and_unmerging_restores_the_bits"),
    Bug("adapters trained and never loaded", "lora", "layer.lora_B.copy_(weights[peft_name(name, \"lora_B\")])", "pass", "lora::an_adapter_comes_back_and_two_are_exchanged"),
    Bug("any base will do", "lora", "if base not in (None, own := base_hash(model)):", "if (own := base_hash(model)) and not base and False:", "lora::an_adapter_of_another_base_is_refused"),
    Bug("a line end inside a text ends the line", "finetuning", '.split("\\n")', ".splitlines()", "finetuning::a_line_separator_inside_a_text_ends_no_line"),
    # bert
    Bug("an encoder with the mask left in", "bert", "attn_mask=mask, dropout_p=dropout", "attn_mask=mask, dropout_p=dropout, is_causal=mask is None", "bert::every_position_reads_every_other bert::full_attention_is_its_definition"),
    Bug("padding is read", "bert", "None if keep is None else keep[:, None, None]", "None", "bert::padding_is_not_read"),
    Bug("chosen tokens not hidden", "bert", "read = torch.where(chosen & (two < parts[0]), mask_token, tokens)", "read = tokens", "bert::what_is_hidden_and_how_often"),
    Bug("no token is changed", "bert", "return torch.where(changed, any_token, read), chosen", "return read, chosen", "bert::what_is_hidden_and_how_often"),
    Bug("tokens changed that nobody asks for", "bert", "changed = chosen & (", "changed = ~chosen & (", "bert::what_is_hidden_and_how_often"),
    Bug("the same places hidden at every step", "bert", "[seed, step], np.uint64", "[seed, 0], np.uint64", "bert::hiding_is_a_function_of_seed_and_step"),
    Bug("masked loss over all tokens", "bert", "weights = chosen * (", "weights = torch.ones_like(chosen) * (", "bert::only_chosen_tokens_count"),
    Bug("an encoder's targets moved by one", "bert", "yield read[group], tokens[group]", "yield read[group], tokens[group].roll(-1, 1)", "bert::only_chosen_tokens_count"),
    Bug("a mean of means over chosen tokens", "bert", "weights[group] / size", "weights[group] / weights[group].sum()", "bert::a_step_is_the_same_in_micro_batches"),
    Bug("the rest of a word shown", "bert", "later = [mask] * (len(filling) - i)", "later = [mask, *filling[i + 1 :]]", "bert::a_blank_is_told_from_left_to_right"),
    Bug("pseudo-likelihood of tokens that are shown", "bert", "[*ids[:i], mask, *ids[i + 1 :]]", "[*ids]", "bert::pseudo_log_probs_hide_one_token_each"),
    Bug("BERT's norm before the attention", "workshop.bert_exchange", "x = self.ln_1(x + self.attn(x, keep))", "x = x + self.attn(self.ln_1(x), keep)", "bert::logits_equal_transformers[0]"),
    Bug("token types forgotten", "workshop.bert_exchange", " + self.wtt(types)", "", "bert::logits_equal_transformers[0]"),
    Bug("no norm after BERT's embeddings", "workshop.bert_exchange", "self.drop(self.ln_0(x))", "self.drop(x)", "bert::logits_equal_transformers[0]"),
    Bug("BERT's head without its bias", "workshop.bert_exchange", "super().head(hidden) + self.bias", "super().head(hidden)", "bert::logits_equal_transformers[0]"),
    Bug("BERT's epsilon forgotten", "workshop.bert_exchange", "eps=self.norm_eps, bias", "bias", "bert::bert_begins_as_bert"),
    Bug("queries loaded as keys", "workshop.bert_exchange", '("query", "key", "value")', '("key", "query", "value")', "bert::logits_equal_transformers[0]"),
    Bug("a decoder classified by its first token", "bert", "hidden(tokens)[:, self.place]", "hidden(tokens)[:, 0]", "bert::a_classifier_reads_one_place"),
    Bug("the title's words left in", "bert", "if word.lower() not in names", "if word not in names", "bert::kinds_hide_their_names"),
    # rewards
    Bug("log-probabilities of the prompt counted", "rewards", "[False] * len(prompt)", "[True] * len(prompt)", "rewards::only_the_answer_is_counted"),
    Bug("padding counted", "rewards", "counted = weights != 0", "counted = weights == weights", "rewards::padding_is_not_counted"),
    Bug("a mean over tokens", "rewards", "* mask).sum(1).mean()", "* mask).sum() / mask.sum()", "rewards::long_and_short_answers_get_the_same_push rewards::a_micro_batch_without_an_answer_is_zero_and_not_nan"),
    Bug("each answer's mean over its tokens", "rewards", "* mask).sum(1).mean()", "* mask).sum(1).div(mask.sum(1)).mean()", "rewards::long_and_short_answers_get_the_same_push rewards::a_micro_batch_without_an_answer_is_zero_and_not_nan"),
    Bug("drawn at one temperature and scored at another", "rewards", "self.base.tokenizer.n_vocab, s.temperature", "self.base.tokenizer.n_vocab, 1.0", "rewards::answers_are_scored_at_the_temperature_that_drew_them"),
    Bug("the vocabulary's padding scored", "rewards", "logits[:, n_vocab:] = -math.inf", "pass", "rewards::answers_are_scored_as_they_were_drawn"),
    Bug("the reference is updated", "rewards", "token_log_probs(self.base.model.to(model.device), *how)", "token_log_probs(model, *how)", "rewards::the_reference_stays_and_the_policy_leaves_it"),
    Bug("k3 of the other sign", "rewards", "d = reference - new", "d = new - reference", "rewards::k3_is_the_kl_on_average"),
    Bug("the KL is a reward", "rewards", "gain - kl * k3", "gain + kl * k3", "rewards::the_kl_pulls_towards_the_reference"),
    Bug("k3 without expm1", "rewards", "torch.expm1(d) - d", "d.exp() - 1 - d", "rewards::k3_keeps_its_digits_near_zero"),
    Bug("advantages of nearly equal rewards explode", "rewards", "return rewards - rewards.mean(-1, keepdim=True)", "return (rewards - rewards.mean(-1, keepdim=True)) / rewards.std(-1, keepdim=True)", "rewards::nearly_equal_rewards_give_small_advantages"),
    Bug("identical pairs kept after the cut", "workshop.preferences", "if a[0] != b[0] and", "if", "rewards::pairs_that_are_equal_after_the_cut_are_dropped"),
    Bug("the clip stops the wrong side", "rewards", "gain = torch.minimum(", "gain = torch.maximum(", "rewards::the_clip_stops_what_has_moved_far_enough"),
    Bug("the old policy moves along", "rewards", 'if "old" not in group:', "if True:", "rewards::several_updates_move_the_ratio"),
    Bug("the answers of a group are one answer", "rewards", "draw_key(seed, *divmod(i, size))", "draw_key(seed, i // size)", "rewards::groups_have_different_answers"),
    Bug("a resumed run draws other answers", "rewards", "draw_key(self.seed, step, place, i)", "draw_key(self.seed, len(self.held), place, i)", "rewards::three_legs_equal_one_byte_for_byte"),
    Bug("a resumed run keeps rows after its checkpoint", "rewards", "cut_rows(self.path, step)", "pass", "rewards::a_killed_run_goes_on_to_the_same_weights"),
    Bug("dropout between drawing and scoring", "rewards", "dropout=0.0", "dropout=config.model.dropout", "rewards::a_run_with_rewards_has_no_dropout"),
    Bug("preferences the wrong way round", "workshop.preferences", "-F.logsigmoid(beta * margin)", "-F.logsigmoid(-beta * margin)", "rewards::dpo_has_the_gradient_of_the_closed_form"),
]  # fmt: skip


# The process that plants


class Planter(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a given text instead of its file."""

    def __init__(self, name: str, path: Path, text: str):
        self.name, self.path, self.text = name, path, text

    def find_spec(self, fullname, path=None, target=None):
        if fullname == self.name:
            make = importlib.util.spec_from_file_location
            return make(fullname, self.path, loader=self)
        return None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        exec(compile(self.text, str(self.path), "exec"), module.__dict__)


def forget_project() -> None:
    """Take gptlib and the tests out of the loaded modules."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.split(".")[0] == "gptlib" or (
            name != "__main__" and file and Path(file).parent == TESTS
        ):
            del sys.modules[name]


def work(bug: Bug | None, node_ids: list[str], log: Path) -> int:
    """What a child does; returns pytest's exit status, or 100 for a faulty row."""
    out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    forget_project()
    if bug:
        try:
            text = bug.planted()
        except (LookupError, SyntaxError) as error:
            print(error)
            return 100
        sys.meta_path.insert(0, Planter(f"gptlib.{bug.module}", bug.path, text))
    os.environ["GPTLIB_RUNS"] = str(log.with_suffix(".runs"))
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # nbval takes 3 s to load
    options = [
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "--tb=line",
        "-rN",
        "-o",
        "addopts=",
    ]
    options += [f"--basetemp={log.with_suffix('.tmp')}"]
    return int(pytest.main([*node_ids, *options]))


def fork(bug: Bug | None, node_ids: list[str], log: Path) -> int:
    """Start `work` in a child; returns the child's number."""
    if child := os.fork():
        return child
    try:
        status = work(bug, node_ids, log)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}")
        status = 101
    sys.stdout.flush()
    os._exit(status)


def run_all(bugs: list[Bug], folder: Path, at_once: int) -> list[dict]:
    """The outcome of each bug, then of the control without one."""
    every = list(dict.fromkeys(node for bug in bugs for node in bug.node_ids))
    waiting = [(None, every), *((bug, bug.node_ids) for bug in bugs)]
    running, found, limit = {}, {}, {None: 4 * LIMIT}
    while waiting or running:
        while waiting and len(running) < at_once:
            bug, node_ids = waiting.pop(0)
            log = folder / f"{len(found) + len(running)}.log"
            running[fork(bug, node_ids, log)] = (bug, log, time.monotonic())
        for child, (bug, log, began) in list(running.items()):
            late = time.monotonic() - began > limit.get(bug, LIMIT)
            if late:
                os.kill(child, 9)
            done, status = os.waitpid(child, 0 if late else os.WNOHANG)
            if done:
                del running[child]
                said = log.read_text(errors="replace") if log.exists() else ""
                code = os.waitstatus_to_exitcode(status)
                seconds = time.monotonic() - began
                found[bug] = {"status": code, "said": said, "seconds": seconds}
        time.sleep(0.005)
    return [found[bug] for bug in [*bugs, None]]


def main() -> None:
    import torch
    import torch.nn.attention  # noqa: F401 (loaded once, for all children)

    torch.set_num_threads(1)
    if importlib.util.find_spec("transformers"):
        from transformers import BertForMaskedLM, GPT2LMHeadModel  # noqa: F401
    for file in sorted({n.split("::")[0] for bug in BUGS for n in bug.node_ids}):
        importlib.import_module(Path(file).stem)  # and what the tests import
    gc.collect()
    gc.freeze()
    wanted = [bug for bug in BUGS if not sys.argv[2:] or bug.name in sys.argv[2:]]
    with tempfile.TemporaryDirectory() as folder:
        found = run_all(wanted, Path(folder), os.cpu_count() or 1)
    Path(sys.argv[1]).write_text(json.dumps(found))


# The tests


pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="planting bugs needs fork, which Windows has not"
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, dict]:
    """What became of each bug, by name, and of the control."""
    path = tmp_path_factory.mktemp("planted") / "outcomes.json"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env |= {"OBJC_DISABLE_INITIALIZE_FORK_SAFETY": "YES", "HF_HUB_OFFLINE": "1"}
    env.pop("PYTEST_ADDOPTS", None)
    env = {k: v for k, v in env.items() if not k.startswith(("PYTEST_", "COV_"))}
    command = [sys.executable, __file__, str(path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    names = [*(bug.name for bug in BUGS), "none"]
    return dict(zip(names, json.loads(path.read_text()), strict=True))


def test_without_a_bug_all_these_tests_pass(outcomes):
    found = outcomes["none"]
    assert found["status"] == 0, found["said"][-3000:]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_bug_is_caught(bug, outcomes):
    found = outcomes[bug.name]
    if found["status"] == 0 and "skipped" in found["said"].rsplit("\n", 2)[-2]:
        pytest.skip("a test that would catch it is skipped here")
    what = {0: "nobody noticed", 100: "the row is out of date"}
    what = what.get(found["status"], f"pytest said {found['status']}, not 1")
    assert found["status"] == 1, f"{what}: {found['said'][-2000:]}"


def test_the_table(outcomes):
    """Printed by `pytest -s` or `-rP`."""
    assert len(BUGS) >= 40 and len(outcomes) == len(BUGS) + 1, "names must differ"
    for bug in BUGS:
        caught = "caught" if outcomes[bug.name]["status"] == 1 else "NOT CAUGHT"
        print(f"{bug.module:24} {bug.name:44} {caught} by {bug.caught_by}")


if __name__ == "__main__":
    main()
