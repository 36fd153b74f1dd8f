"""The classic mistakes of tensor and sequence parallelism, and the tests that catch each.

tests/mutations.py plants them. Choose the smallest edit that makes the mistake as people make it, a
program that runs and is wrong; and the fastest tests that catch it: two ranks are faster than four,
a layer faster than a step. The replaced text must occur exactly once in its file.
"""

from dataclasses import dataclass

_MAPPINGS = "tests/parallel/test_mappings.py::"
_LAYERS = "tests/parallel/test_layers.py::"
_LOSS = _LAYERS + "test_loss_equals_dense"
_MODEL = "tests/model/test_gpt.py::test_loss_and_gradients_equal_the_reference"
_DROPOUT = "tests/parallel/test_randomness.py::test_dropout_add_equals_the_formula"
_WEIGHTS = "tests/parallel/test_sharding.py::test_initial_weights_do_not_depend_on_the_layout"
_CONTEXT = "tests/parallel/test_context.py::"
_CP_LAYER = _CONTEXT + "test_a_layer_equals_the_dense_reference"
_CP_LEARNED, _CP_ROPE = _CP_LAYER + "[learned-False-", _CP_LAYER + "[rope, two groups-True-"
_CP_STEPS = "tests/test_context_runs.py::test_steps_and_evaluations_equal_one_process"
_CP2, _RING2 = "tp1-dp1-cp2 all_gather]", "tp1-dp1-cp2 p2p]"
_DECODING = "tests/model/test_decoding.py::test_cached_tokens_equal_uncached"
_PIPELINE = "tests/parallel/test_pipeline.py::"
_PIPELINE_BITS = _PIPELINE + "test_stages_give_the_same_bits[tp1-dp1-pp2-train.precision=fp32]"
_PIPELINE_TIED = _PIPELINE + "test_tied_stages_give_the_same_losses[tp1-dp1-pp2-step]"
_HSDP_BITS = "tests/test_hsdp_runs.py::test_an_hsdp_run_resumes_bit_for_bit"
_STEP = "tests/test_train_layouts.py::test_a_step_equals_the_reference"


@dataclass(frozen=True)
class Mistake:
    """An edit that introduces a mistake, and the tests of which at least one must fail."""

    name: str
    file: str
    right: str  # in the file exactly once
    wrong: str
    tests: tuple[str, ...]  # node ids, the fastest that catch it


MISTAKES = (
    # Gradients that each rank has for some positions, heads or groups only.
    Mistake(
        "gradients of norms are not summed over the sequence shards",
        "model/norm.py",
        "config.norm_epsilon, mesh, mesh.sequence_parallel)",
        "config.norm_epsilon, mesh, False)",
        (_MODEL + "[gpt2-False-tp2+sp-dp1]",),
    ),
    Mistake(
        "the gradient of a row-parallel bias is not summed over the sequence shards",
        "parallel/layers.py",
        "grad_is_partial=mesh.sequence_parallel",
        "grad_is_partial=False",
        (_LAYERS + "test_row_equals_dense[True-tp2+sp-dp1]",),
    ),
    Mistake(
        "gradients of learned positions are not summed over the sequence shards",
        "model/gpt.py",
        "grad_is_partial=mesh.sequence_parallel",
        "grad_is_partial=False",
        (_MODEL + "[gpt2-False-tp2+sp-dp1]",),
    ),
    Mistake(
        "gradients of QK-norms are summed over tp with sequence parallelism only",
        "model/norm.py",
        "mesh.tp.size > 1)",
        "mesh.sequence_parallel)",
        (_MODEL + "[one group, biases, qk norm-False-tp2-dp1]",),
    ),
    Mistake(
        "gradients of keys and values that ranks share are not summed over tp",
        "parallel/parameters.py",
        "is_partial = grad_is_partial or spec.tp_dim_at(mesh.tp.size) != spec.tp_dim",
        "is_partial = grad_is_partial",
        (_LAYERS + "test_shared_row_groups_equal_dense[False-1-tp2-dp1]",),
    ),
    Mistake(
        "partial gradients are averaged over tp where they should be summed",
        "parallel/gradients.py",
        "sum_over(mesh.tp, torch.cat(partial))",
        "sum_over(mesh.tp, torch.cat(partial)) / mesh.tp.size",
        (_MODEL + "[gpt2-False-tp2+sp-dp1]",),
    ),
    Mistake(
        "the step forgets to sum partial gradients over tp",
        "training/step.py",
        "    sum_partial_gradients(gradients, mesh)\n",
        "",
        (_STEP + "[tp2+sp-dp1]",),
    ),
    # Layers: what crosses the wire, where, and back.
    Mistake(
        "the row-parallel bias is inside the product and so added t times",
        "parallel/layers.py",
        """\
            y = linear(x, weight)  # [s, b, out], a partial sum
            y = exit_tensor_parallel_region(y, self.mesh)  # [s/t, b, out]
""",
        """\
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return exit_tensor_parallel_region(linear(x, weight, bias), self.mesh)
""",
        (_LAYERS + "test_row_equals_dense[True-tp2-dp1]",),
    ),
    Mistake(
        "a rank computes the wrong group of keys and values",
        "parallel/layers.py",
        "mesh.tp.rank * num_groups // t * size",
        "mesh.tp.rank % num_groups * size",
        (_LAYERS + "test_shared_row_groups_equal_dense[False-2-tp4-dp1]",),
    ),
    Mistake(
        "the gather before tensor-parallel compute has a split as its backward",
        "parallel/mappings.py",
        "_Mapping.apply(x, axis, all_gather, reduce_scatter)",
        "_Mapping.apply(x, axis, all_gather, local_sequence_chunk)",
        (_LAYERS + "test_column_equals_dense[tp2+sp-dp1]",),
    ),
    Mistake(
        "the gather before duplicated compute has a reduce-scatter as its backward",
        "parallel/mappings.py",
        "_Mapping.apply(x, axis, all_gather, local_sequence_chunk)",
        "_Mapping.apply(x, axis, all_gather, reduce_scatter)",
        (_MAPPINGS + "test_what_follows_a_gather_decides_its_backward[tp2+sp-dp1]",),
    ),
    Mistake(
        "the sequence is gathered outside autograd, which cuts the graph",
        "parallel/mappings.py",
        "return _Mapping.apply(x, axis, all_gather, reduce_scatter)",
        "return all_gather(x.detach(), axis)",
        (_LAYERS + "test_column_then_row_equals_dense[tp2+sp-dp1]",),
    ),
    Mistake(
        "without sequence parallelism dX is not summed before a column-parallel layer",
        "parallel/mappings.py",
        "_Mapping.apply(x, axis, _identity, all_reduce)",
        "_Mapping.apply(x, axis, _identity, _identity)",
        (_LAYERS + "test_column_equals_dense[tp2-dp1]",),
    ),
    Mistake(
        "the sum after a row-parallel layer sums gradients too, t times what they are",
        "parallel/mappings.py",
        "_Mapping.apply(x, axis, all_reduce, _identity)",
        "_Mapping.apply(x, axis, all_reduce, all_reduce)",
        (_LAYERS + "test_row_equals_dense[True-tp2-dp1]",),
    ),
    Mistake(
        "an all-reduce writes into its input, which autograd may have saved",
        "parallel/collectives.py",
        "x.clone(memory_format=torch.contiguous_format)",
        "x.contiguous()",
        (_MAPPINGS + "test_inputs_are_not_written_to[reduce-tp2+sp-dp1]",),
    ),
    Mistake(
        "the head multiplies x without entering the region, so its dX is not summed",
        "parallel/layers.py",
        "linear_fp32(enter_tensor_parallel_region(x, mesh)[positions], weight)",
        "linear_fp32(x[positions], weight)",
        (_LAYERS + "test_logits_equal_dense[tp2-dp1]",),
    ),
    Mistake(
        "the overlapped column-parallel layer does not sum dX over the ranks",
        "parallel/overlap.py",
        "summing = start_tp_reduce(grad_x, mesh)",
        "summing = Pending(grad_x)",
        (_LAYERS + "test_column_equals_dense[tp2-dp1-overlap backward]",),
    ),
    Mistake(
        "the overlapped column-parallel layer makes dA from its own shard of X, not from all of it",
        "parallel/overlap.py",
        "rows = _rows(gathering.wait())",
        "rows = _rows(x.repeat(grad_x.shape[0] // x.shape[0], 1, 1))",
        (_LAYERS + "test_column_equals_dense[tp2+sp-dp1-overlap backward]",),
    ),
    Mistake(
        "embedding rows of ids on other ranks are not zeroed",
        "parallel/layers.py",
        "        rows = rows.masked_fill(elsewhere.unsqueeze(-1), 0.0)  # [s, b, h]\n",
        "",
        (_LAYERS + "test_embedding_equals_dense[20-tp2+sp-dp1]",),
    ),
    # Positions and documents.
    Mistake(
        "every rank adds the learned positions of the first sequence shard",
        "model/gpt.py",
        "sequence_shard(positions, self.mesh), x.dtype)",
        "positions[: x.shape[0]], x.dtype)",
        (_MODEL + "[gpt2-False-tp2+sp-dp1]",),
    ),
    Mistake(
        "rotary angles start anew in every sequence shard",
        "model/gpt.py",
        "self.config, positions, key_blocks, stream",
        "self.config, positions % shape[0], key_blocks, stream",
        (_MODEL + "[llama-False-tp2+sp-dp1]",),
    ),
    Mistake(
        "a token attends to the documents before its own",
        "model/attention.py",
        "context.key_blocks[0].segments",
        "None",
        (_MODEL + "[gpt2-True-tp1-dp1]",),
    ),
    Mistake(
        "padding to a multiple of t counts as read, and later tokens see it",
        "model/generation/decoding.py",
        "cache.length += n\n",
        "cache.length += n + len(padding)\n",
        (_DECODING + "[gpt2-tp2+sp-dp1]",),
    ),
    # Cross-entropy over vocabulary shards.
    Mistake(
        "rows that pad the vocabulary count in the softmax, with logits of 0",
        "parallel/loss.py",
        """\
    assert len(weight) == end_id - first_id, "weight must be this rank's part of the vocabulary"
""",
        """\
    missing = -(-vocab_size // mesh.tp.size) - (end_id - first_id)
    weight = torch.nn.functional.pad(weight, (0, 0, 0, missing))
""",
        (_LOSS + "[4-1.0-23-tp2-dp1]",),
    ),
    Mistake(
        "each rank has the log of the sum over its own part of the vocabulary",
        "parallel/loss.py",
        "all_gather(mine, tp) if tp.size > 1 else mine",
        "mine",
        (_LOSS + "[4-1.0-20-tp2-dp1]",),
    ),
    Mistake(
        "no maximum is subtracted from the logits, and exp(1e4) overflows",
        "parallel/loss.py",
        "maximum = z.amax(dim=1)",
        "maximum = torch.zeros_like(target_logit)",
        (_LOSS + "[4-10000.0-20-tp2-dp1]",),
    ),
    Mistake(
        "ranks that do not have the target add the logit of another column",
        "parallel/loss.py",
        ".squeeze(1).masked_fill(~target.is_ours, 0.0)",
        ".squeeze(1)",
        (_LOSS + "[4-1.0-20-tp2-dp1]",),
    ),
    Mistake(
        "ignored targets have a gradient",
        "parallel/loss.py",
        "softmax_scale.masked_fill(~target.counts, 0.0)",
        "softmax_scale",
        (_LOSS + "[4-1.0-20-tp2-dp1]",),
    ),
    Mistake(
        "a rank keeps what its part of the vocabulary says of x, and nobody sums that",
        "parallel/loss.py",
        "start_tp_reduce(grad_rows, mesh).wait()",
        "grad_rows",
        (_LOSS + "[4-1.0-20-tp2-dp1]",),
    ),
    # The mean over the global batch.
    Mistake(
        "mean of means: each micro-batch is divided by its own number of targets",
        "training/step.py",
        "return output.objective / num_targets",
        "return output.objective / micro_batch.num_targets / len(micro_batches)",
        (_STEP + "[tp1-dp1]",),
    ),
    Mistake(
        "targets are counted on this data-parallel rank alone",
        "training/step.py",
        "num_targets = batch.num_targets or math.nan",
        "num_targets = sum(part.num_targets for part in batch.micro_batches)",
        (_STEP + "[tp1-dp2]",),
    ),
    Mistake(
        "targets are counted once for each tensor-parallel rank",
        "training/step.py",
        "num_targets = batch.num_targets or math.nan",
        "num_targets = batch.num_targets * mesh.tp.size",
        (_STEP + "[tp2-dp1]",),
    ),
    Mistake(
        "the loss is summed over tp, where every rank has all of it",
        "training/step.py",
        "counts = float(mesh.tp.rank == 0 and mesh.is_last_stage)",
        "counts = 1.0",
        (_STEP + "[tp2-dp1]",),
    ),
    Mistake(
        "FSDP2 averages gradients that are already divided",
        "parallel/data_parallel.py",
        """\
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
""",
        "",
        (_MODEL + "[gpt2-False-tp1-dp2]",),
    ),
    Mistake(
        "tensor-parallel ranks read different batches, as if data-parallel",
        "training/state.py",
        "        dp_rank=mesh.dp.rank,\n        dp_size=mesh.dp.size,\n",
        "        dp_rank=mesh.world.rank,\n        dp_size=mesh.world.size,\n",
        (_STEP + "[tp2-dp1]",),
    ),
    # The gradient norm.
    Mistake(
        "each rank clips by the norm of its own gradients",
        "training/step.py",
        "clip_gradients(gradients, grad_norm, ",
        "clip_gradients(gradients, values[2].sqrt().item(), ",
        (_STEP + "[tp1-dp2]",),
    ),
    Mistake(
        "replicated gradients count t times in the norm",
        "parallel/gradients.py",
        "(gradient.tp_dim is not None or mesh.tp.rank == 0)",
        "True",
        (_MODEL + "[gpt2-False-tp2+sp-dp1]",),
    ),
    Mistake(
        "the norm is taken before partial gradients are summed",
        "training/step.py",
        """\
    sum_partial_gradients(gradients, mesh)

    # tp ranks have the same losses, and only the last stage has any.
    counts = float(mesh.tp.rank == 0 and mesh.is_last_stage)
    values = torch.cat([losses * counts, squared_norm(gradients, mesh).view(1)])
""",
        """\
    counts = float(mesh.tp.rank == 0 and mesh.is_last_stage)
    values = torch.cat([losses * counts, squared_norm(gradients, mesh).view(1)])
    sum_partial_gradients(gradients, mesh)
""",
        (_STEP + "[tp2+sp-dp1]",),
    ),
    Mistake(
        "only the first rank clips",
        "training/step.py",
        "if config.optimizer.clip_grad > 0:",
        "if config.optimizer.clip_grad > 0 and mesh.world.rank == 0:",
        (_STEP + "[tp1-dp2]",),
    ),
    # Pipelines.
    Mistake(
        "layer numbers restart at 0 on every stage",
        "model/gpt.py",
        "Block(config, layer, mesh, recompute))",
        "Block(config, len(chunk), mesh, recompute))",
        (_PIPELINE_BITS,),
    ),
    Mistake(
        "each stage clips by the norm of its own gradients",
        "training/step.py",
        "float(np.float32(math.sqrt(square)))",
        "float(values[-1].sqrt())",
        (_PIPELINE_BITS,),
    ),
    Mistake(
        "the two gradients of a tied table are not summed",
        "parallel/gradients.py",
        "            sum_over(mesh.tied, gradient.tensor)\n",
        "            pass\n",
        (_PIPELINE_TIED,),
    ),
    Mistake(
        "a tied table counts twice in the norm",
        "parallel/gradients.py",
        "(not gradient.is_tied or mesh.pp.rank == 0)",
        "True",
        (_PIPELINE_TIED,),
    ),
    Mistake(
        "the loss is divided by the number of micro-batches as well",
        "training/step.py",
        "return output.objective / num_targets",
        "return output.objective / num_targets / len(micro_batches)",
        (_STEP + "[tp1-dp1]",),
    ),
    Mistake(
        "a stage runs all forwards first and keeps the activations of all micro-batches",
        "parallel/pipeline.py",
        "if num_alive == max_alive(p, num_chunks, stage):",
        "if num_alive == num_micro_batches * num_chunks:",
        (_PIPELINE + "test_schedules[2-1-11]",),
    ),
    Mistake(
        "backwards run in the reverse order of the forwards",
        "parallel/pipeline.py",
        "(pair[0] // p, -pair[1], pair[0])",
        "(pair[0] // p, -pair[1], -pair[0])",
        (_PIPELINE + "test_schedules[2-1-11]",),
    ),
    Mistake(
        "a stage skips a step by itself",
        "training/step.py",
        "why_skipped = skip_reason(loss, grad_norm, state, config.train)",
        "why_skipped = skip_reason(loss, float(values[-1].sqrt()), state, config.train)",
        (_PIPELINE + "test_all_stages_skip_a_step[tp1-dp1-pp2]",),
    ),
    Mistake(
        "only the last stage evaluates, and waits for the others",
        "training/evaluation.py",
        """\
        losses = model(**batch.to(mesh.device).inputs())
        if mesh.is_last_stage:
            nats""",
        """\
        if mesh.is_last_stage:
            losses = model(**batch.to(mesh.device).inputs())
            nats""",
        (_PIPELINE_BITS,),
    ),
    # Randomness.
    Mistake(
        "a sequence shard is dropped by its local positions, alike on every rank",
        "parallel/randomness.py",
        "sequence_shard(local.int(), mesh)",
        "local.int()[: shape[0]]",
        (_DROPOUT + "[False-tp2+sp-dp1]",),
    ),
    Mistake(
        "without sequence parallelism ranks drop differently what they all have",
        "parallel/randomness.py",
        "sequence_shard(local.int(), mesh)",
        "local.int()[: shape[0]] + mesh.tp.rank * shape[0]",
        (_DROPOUT + "[False-tp2-dp1]",),
    ),
    Mistake(
        "a mask goes by the place in the micro-batch, not by the global sample",
        "data/loader.py",
        "self._config.run.seed, micro_batch.sample_indices.tolist()",
        "self._config.run.seed, range(len(micro_batch.sample_indices))",
        (_STEP + "[tp1-dp1]",),
    ),
    Mistake(
        "heads of all tensor-parallel ranks have the same attention dropout",
        "model/attention.py",
        "stream.attention_seed(self.layer, self.mesh.tp.rank)",
        "stream.attention_seed(self.layer, 0)",
        ("tests/model/test_gpt.py::test_attention_dropout_differs_between_ranks[tp2+sp-dp1]",),
    ),
    Mistake(
        "each rank draws its own initial weights, not a part of the whole",
        "parallel/parameters.py",
        "shard.tensor.copy_(full[shard.slices])",
        "shard.tensor.normal_(0.0, spec.init_std, generator=generator)",
        (_WEIGHTS + "[tp2+sp-dp1]",),
    ),
    Mistake(
        "every rank takes the first rank's part of a weight",
        "parallel/parameters.py",
        "shard_range(spec.shape[tp_dim], tp_size, tp_rank)",
        "shard_range(spec.shape[tp_dim], tp_size, 0)",
        (_WEIGHTS + "[tp2+sp-dp1]",),
    ),
    Mistake(
        "a sum over ranks in bf16 is rounded after each of them",
        "parallel/transport/backend.py",
        "total = first.float() if result.dtype in _HALVES else",
        "total = first.clone() if result.dtype in _HALVES else",
        (
            "tests/parallel/test_shared_memory.py::test_sums_are_exact[torch.bfloat16-tp3+sp-dp1-memory]",
        ),
    ),
    # Context parallelism.
    Mistake(
        "rotary embeddings take the positions in a rank's part of the row",
        "data/rows.py",
        "            positions=self.positions[:, columns],\n",
        "            positions=self.positions[:, : len(columns)],\n",
        (_CP_ROPE + _CP2,),
    ),
    Mistake(
        "documents have the same places in the parts of two ranks",
        "ops/segments.py",
        "chunks[rank][:end]",
        "chunks[cp_rank][:end]",
        (_CP_ROPE + _CP2,),
    ),
    Mistake(
        "targets are shifted after the row is split over cp",
        "data/rows.py",
        "        targets = self.targets[:, columns]\n",
        "        targets = self.tokens[:, columns].roll(-1, 1)\n",
        (_CP_LEARNED + _CP2,),
    ),
    Mistake(
        "targets are counted once for each context-parallel rank",
        "data/loader.py",
        "            count_targets(",
        '            self._cp.get("cp_size", 1) * count_targets(',
        (_CP_STEPS + "[" + _CP2,),
    ),
    Mistake(
        "gradients are averaged over cp",
        "training/step.py",
        "return output.objective / num_targets",
        "return output.objective / num_targets / run.mesh.cp.size",
        (_CP_STEPS + "[" + _CP2,),
    ),
    Mistake(
        "gradients are summed over dp but not over cp",
        "parallel/data_parallel.py",
        "mesh=mesh.fsdp_mesh",
        'mesh=mesh.device_mesh["dp"]',
        (_CP_LEARNED + "tp1-dp2-cp2 all_gather]",),
    ),
    Mistake(
        "held-out losses are summed over dp but not over cp",
        "training/evaluation.py",
        "sum_over(mesh.dp_cp, nats)",
        "sum_over(mesh.dp, nats)",
        (_CP_STEPS + "[" + _CP2,),
    ),
    # HSDP.
    Mistake(
        "gradients are not summed over HSDP replicas",
        "parallel/data_parallel.py",
        "set_requires_all_reduce(is_last, ",
        "set_requires_all_reduce(False, ",
        (_STEP + "[tp1-dp2/2]",),
    ),
    Mistake(
        "every HSDP replica counts its gradients in the norm",
        "parallel/gradients.py",
        ".square().sum() / mesh.replicas.size",
        ".square().sum()",
        (_STEP + "[tp1-dp2/2]",),
    ),
    Mistake(
        "every HSDP replica writes its shards",
        "checkpoints/save.py",
        "is_copy |= mesh.replicas.rank > 0",
        "is_copy |= False",
        (_HSDP_BITS,),
    ),
    Mistake(
        "a rank keeps only its own part of the gradients of its keys and values",
        "parallel/context.py",
        "    return reduce_scatter(torch.cat([by_rank[rank] for rank in range(cp.size)]), cp)\n",
        "    return by_rank[cp.rank]\n",
        (_CP_LEARNED + _CP2,),
    ),
    Mistake(
        "gradients of keys and values do not come home around the ring",
        "parallel/context.py",
        "    return own + receiving.wait()\n",
        "    return own + receiving.wait() * 0\n",
        (_CP_LEARNED + _RING2,),
    ),
    Mistake(
        "gathered keys are taken in the order of ranks",
        "parallel/context.py",
        "yield by_rank[cp.rank - step]",
        "yield by_rank[step]",
        (_CP_LEARNED + _CP2,),
    ),
    Mistake(
        "a query that sees no key of a block is merged as if it saw one",
        "ops/sdpa.py",
        "_NO_KEYS = -math.inf",
        "_NO_KEYS = 0.0",
        (_CP_ROPE + _CP2,),
    ),
    Mistake(
        "outputs for several blocks of keys are averaged",
        "parallel/context.py",
        "(part - total).exp()",
        "torch.full_like(part, 0.5)",
        (_CP_LEARNED + _CP2,),
    ),
    Mistake(
        "outputs for several blocks of keys are merged in bf16",
        "parallel/context.py",
        "part[0].to(part[1].dtype,",
        "part[0].to(q.dtype,",
        (_CONTEXT + "test_attention_in_bf16_is_rounded_once[tp1-dp1-cp4 all_gather]",),
    ),
    Mistake(
        "dropout goes by the position in a rank's part of the row",
        "parallel/randomness.py",
        "balanced_positions(num_local * mesh.cp.size, mesh.cp.rank, mesh.cp.size, keys.device)",
        "balanced_positions(num_local, 0, 1, keys.device)",
        (_CP_LEARNED + _CP2,),
    ),
    Mistake(
        "each rank gets one contiguous part of the row",
        "ops/balance.py",
        "torch.cat((chunks[rank], chunks[-1 - rank]))",
        "torch.cat((chunks[2 * rank], chunks[2 * rank + 1]))",
        (_CONTEXT + "test_every_rank_has_equal_work[2]",),
    ),
)
