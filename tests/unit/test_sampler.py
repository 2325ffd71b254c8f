"""The sampler on small random models: rules, equalities between ways of decoding, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada2_jax import sampler
from llada2_jax.decoding_rules import StopOnEos, Threshold, even_schedule, filter_logits
from llada2_jax.model import init_params, merge_params
from llada2_jax.sampler import (
    RequestError,
    SamplerOptions,
    bucket,
    compile_count,
    generate_tokens,
    stream_tokens,
)
from llada2_jax.types import ModelConfig, SpecialTokens
from pallas_kernels.block_layout import CLEAN, half_layout
from tests.helpers import random_params

VOCAB, MASK, EOS, BLOCK = 61, 7, 3, 4
CFG = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    intermediate_size=32,
    moe_intermediate_size=16,
    num_experts=4,
    experts_per_token=2,
    n_group=2,
    topk_group=1,
    initializer_range=0.3,
    max_position_embeddings=64,
    dtype="float32",
)
SPECIAL = SpecialTokens(mask=MASK, eos=EOS, pad=EOS)
# Every batch has three rows and a prompt of this length, so that nearly all share a program.
LONGEST = 9


@pytest.fixture(scope="module")
def params():
    return init_params(CFG, 0)


def decode(params, prompts, row_ids=None, **options):
    options = {"block_size": BLOCK, "max_new_tokens": 6, "threshold": 0.3} | options
    return generate_tokens(CFG, params, prompts, SPECIAL, SamplerOptions(**options), row_ids)


def same(a, b, rows=slice(None)) -> None:
    """Outputs, trajectories and counts of denoising forwards are equal."""
    assert a.tokens == b.tokens[rows]
    np.testing.assert_array_equal(a.accepted_at, b.accepted_at[rows])
    np.testing.assert_array_equal(a.edits, b.edits[rows])
    np.testing.assert_array_equal(a.denoise_forwards, b.denoise_forwards[rows])
    np.testing.assert_allclose(a.confidence, b.confidence[rows], atol=1e-4)


ids = st.integers(0, VOCAB - 1)
# Not empty: in a block of nothing but masks all positions tie, and rounding chooses among them.
prompts_of_three = st.tuples(
    st.lists(ids, min_size=LONGEST, max_size=LONGEST),
    st.lists(ids, min_size=1, max_size=LONGEST),
    st.lists(ids, min_size=1, max_size=LONGEST),
).map(list)
thresholds = st.sampled_from([0.0, 0.2, 0.4, 0.7, 1.0])
lengths = st.integers(5, 7)  # with LONGEST: always four blocks
SAMPLED = {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02}
GREEDY = [{}, {"edit_threshold": 0.1, "edit_budget": 3}]
samplings = st.sampled_from([*GREEDY, SAMPLED])


# ------------------------------------------------------- one result, however it is computed


@settings(max_examples=12, deadline=None, derandomize=True)
@given(prompts_of_three, thresholds, lengths, st.integers(1, 5), samplings)
def test_separate_and_fused_commits_agree(params, prompts, threshold, length, steps, sampling):
    options = {"threshold": threshold, "max_new_tokens": length, "steps": steps, **sampling}
    separate = decode(params, prompts, **options)
    fused = decode(params, prompts, **options, fuse_commit=True)
    same(separate, fused)
    np.testing.assert_array_equal(separate.commit_forwards, separate.commits)
    np.testing.assert_array_equal(fused.commits, separate.commits)
    assert not fused.commit_forwards.any()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(prompts_of_three, thresholds, lengths, st.integers(1, 5), st.sampled_from(GREEDY))
def test_cached_and_uncached_agree(params, prompts, threshold, length, steps, editing):
    options = {"threshold": threshold, "max_new_tokens": length, "steps": steps, **editing}
    uncached = decode(params, prompts, **options, cache=False)
    same(decode(params, prompts, **options), uncached)
    assert not uncached.commits.any()


def lists_of(shortest, longest):
    return st.lists(ids, min_size=shortest, max_size=longest)


# A prompt within the first block, and one that ends in the third: of two shapes on their own.
@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.tuples(lists_of(8, 11), lists_of(1, 3), lists_of(8, 11)), thresholds, samplings)
def test_a_batch_gives_what_its_rows_give_one_by_one(params, prompts, threshold, sampling):
    options = {"threshold": threshold, "max_new_tokens": 5, **sampling}
    batch = decode(params, prompts, **options)
    for row, prompt in enumerate(prompts):
        same(decode(params, [prompt], [row], **options), batch, slice(row, row + 1))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(lists_of(0, 3) | lists_of(8, 11), thresholds, st.booleans(), samplings)
def test_streaming_gives_the_same_block_by_block(params, prompt, threshold, early, sampling):
    options = SamplerOptions(
        block_size=BLOCK, max_new_tokens=5, threshold=threshold, early_stop=early, **sampling
    )
    whole = generate_tokens(CFG, params, [prompt], SPECIAL, options)
    built = compile_count()
    parts = list(stream_tokens(CFG, params, prompt, SPECIAL, options))
    assert compile_count() == built  # the very same program
    same(parts[-1], whole)
    assert [p.done.all() for p in parts] == [False] * (len(parts) - 1) + [True]
    ends = [(len(prompt) // BLOCK + i) * BLOCK - len(prompt) for i in range(1, len(parts))]
    assert [len(p.tokens[0]) for p in parts[:-1]] == ends
    last = len(prompt) + len(whole.tokens[0]) - 1
    assert len(parts) == last // BLOCK - len(prompt) // BLOCK + 1
    for part in parts:
        assert part.tokens[0] == whole.tokens[0][: len(part.tokens[0])]


def test_a_model_that_stops_at_eos_streams_and_batches_the_same(params):
    """A frequent token as EOS, so that rows end at different times."""
    prompts = [[1, 2, 3, 4, 5, 6, 8, 9, 10], [11], [30, 31, 32, 33]]
    free = decode(params, prompts, stop_on_eos=False)
    for early in (False, True):
        for token in {t for row in free.tokens for t in row}:
            special = SpecialTokens(MASK, token, token)
            options = SamplerOptions(
                block_size=BLOCK, max_new_tokens=6, threshold=0.3, early_stop=early
            )
            got = generate_tokens(CFG, params, prompts, special, options)
            for row, full in enumerate(free.tokens):
                cut = full.index(token) + 1 if token in full else len(full)
                assert got.tokens[row] == full[:cut]
                assert got.ended_by_eos[row] == (token in full)
            assert (got.denoise_forwards <= free.denoise_forwards).all()


# ----------------------------------------------------------------------------- the promises


def test_every_forward_accepts_and_threshold_one_accepts_one(params):
    # All rows end with a block, so that the record holds all accepted positions.
    generation = decode(params, [list(range(10, 19)), [9] * 5, [8]], max_new_tokens=7)
    for row, forwards in enumerate(generation.denoise_forwards):
        assert set(generation.accepted_at[row]) == set(range(forwards))
    slow = decode(params, [list(range(10, 19))], threshold=1.0, max_new_tokens=7)
    assert slow.denoise_forwards[0] == slow.accepted[0] == 7
    assert slow.commits[0] == 1  # the last block needs no commit
    assert slow.tokens_per_forward == 1.0
    assert slow.tokens_per_forward_with_commits == pytest.approx(7 / 8)


@pytest.mark.parametrize("fuse_commit, forwards", [(False, 8), (True, 7)])
def test_a_fused_commit_costs_no_forward(monkeypatch, fuse_commit, forwards):
    """Counts what runs, not what the sampler says of itself."""
    ran, iterate = [], sampler._iterate

    def counted(*arguments):
        jax.debug.callback(lambda: ran.append(1))
        return iterate(*arguments)

    monkeypatch.setattr(sampler, "_iterate", counted)
    # A program of its own, and one that is quicker to compile.
    cfg = dataclasses.replace(CFG, num_layers=1, first_k_dense_replace=0)
    options = SamplerOptions(
        block_size=BLOCK, max_new_tokens=7, threshold=1.0, fuse_commit=fuse_commit
    )
    params = random_params(cfg, 0, 0.3)
    generation = generate_tokens(cfg, params, [list(range(10, 19))], SPECIAL, options)
    jax.effects_barrier()
    assert len(ran) == forwards
    assert generation.commits[0] == 1
    assert generation.tokens_per_forward_with_commits == pytest.approx(7 / forwards)


def test_steps_bound_the_forwards_of_a_block(params):
    generation = decode(params, [[1] * 8], threshold=1.0, steps=2, max_new_tokens=8)
    assert generation.denoise_forwards[0] == 4
    np.testing.assert_array_equal(np.bincount(generation.accepted_at[0]), [2, 2, 2, 2])


@pytest.mark.parametrize("sampling", [{}, {"temperature": 2.0}], ids=str)
def test_the_mask_is_never_emitted(params, sampling):
    """The head is changed so that the mask would win almost everywhere."""
    head = params["head"][...]
    loved = jax.tree.map(lambda x: x, params)
    loved["head"] = params["head"].replace(head.at[:, MASK].set(40 * head[:, 20]))
    also = jax.tree.map(lambda x: x, params)
    also["head"] = params["head"].replace(head.at[:, MASK].set(-40 * head[:, 20]))
    for changed in (loved, also):
        prompts = [list(range(10, 19)), [MASK], []]
        generation = decode(changed, prompts, stop_on_eos=False, **sampling)
        assert all(len(row) == 6 and MASK not in row for row in generation.tokens)
        assert (generation.confidence > 0).all() and (generation.confidence <= 1).all()


def test_masks_in_a_prompt_are_tokens_of_the_prompt(params):
    prompts = [[MASK] * 9, [10, MASK, MASK], [10, 11, 12, 13, MASK]]
    generation = decode(params, prompts, stop_on_eos=False, max_new_tokens=7)
    # Whole blocks are filled, but for what the prompt holds of them.
    np.testing.assert_array_equal(generation.accepted, [7, 9, 7])
    assert all(len(row) == 7 for row in generation.tokens)
    prompts[1] = [10, 12, 12]
    other = decode(params, prompts, stop_on_eos=False, max_new_tokens=7)
    assert other.tokens[1] != generation.tokens[1]


def test_an_eos_in_the_prompt_stops_nothing(params):
    generation = decode(params, [[EOS] * 9, [10, EOS], [EOS]], max_new_tokens=6)
    np.testing.assert_array_equal(generation.accepted >= 6, ~generation.ended_by_eos)
    rows = [r for r, ended in enumerate(generation.ended_by_eos) if not ended]
    assert rows and all(len(generation.tokens[r]) == 6 for r in rows)


def test_seeds_and_row_ids_decide_the_draws(params):
    prompts = [[5, 6], [5, 6], [8] * LONGEST]

    def drawn(seed, row_ids=None):
        options = {"temperature": 1.5, "stop_on_eos": False, "seed": seed}
        return decode(params, prompts, row_ids, **options).tokens

    first = drawn(1)
    assert first == drawn(1) and first != drawn(2)
    assert first[0] != first[1]
    assert drawn(1, [1, 0, 2]) == [first[1], first[0], first[2]]


def test_sampling_from_one_token_is_greedy(params):
    prompts = [[5, 6], [8] * LONGEST, [9]]
    greedy = decode(params, prompts)
    for only_best in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}):
        same(decode(params, prompts, temperature=0.7, **only_best), greedy)


def test_draws_follow_the_distribution(params):
    logits = np.float32([2.0, 1.0, -np.inf, 0.0])
    rows = 4000
    _, request, _ = sampler._start(CFG, [[1]] * rows, SPECIAL, SamplerOptions(), range(rows))
    zeros = np.zeros(rows, np.int32)
    drawn = jax.jit(sampler._draw)(np.tile(logits, (rows, 1, 1)), zeros[:, None], request, zeros)
    frequency = np.bincount(np.asarray(drawn).ravel(), minlength=4) / rows
    np.testing.assert_allclose(frequency, jax.nn.softmax(logits), atol=0.03)


def test_one_program_a_shape_bucket(params):
    decode(params, [[1] * LONGEST, [2], [3]])
    built = compile_count()
    for changes in ({"threshold": 0.9}, {"steps": 1}, {"max_new_tokens": 7}, {"seed": 3}):
        again = decode(params, [[9] * 8, [], [4] * 5], **changes)
        assert again.compile_seconds == 0
    assert compile_count() == built
    assert decode(params, [[1], [2]], block_size=1, max_new_tokens=1).compile_seconds > 0
    assert compile_count() == built + 1


# ---------------------------------------------------------------------------------- editing


@jax.jit
def block_logits(params, tokens, block):
    """Logits of one block given the blocks before it, from a forward over all of the row."""
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    blocks = positions // BLOCK
    layout = half_layout(blocks, (blocks <= block).astype(jnp.int32), CLEAN)
    model = merge_params(CFG, params)
    logits = model.logits(model(tokens, positions, layout).hidden)
    return jax.lax.dynamic_slice_in_dim(logits[0], block * BLOCK, BLOCK)


def edited_by_hand(params, prompt, count, threshold, edit_threshold, budget):
    """Tokens, forwards and replacements, position by position in plain Python."""
    tokens = [*prompt, *[MASK] * (16 - len(prompt))]
    masked = [i >= len(prompt) for i in range(16)]
    forwards, replaced = 0, [0] * 16
    for block in range(len(prompt) // BLOCK, (len(prompt) + count - 1) // BLOCK + 1):
        here = range(block * BLOCK, (block + 1) * BLOCK)
        settling = 0
        while any(masked[i] for i in here) or settling < budget:
            settling += not any(masked[i] for i in here)
            forwards += 1
            logits = np.array(block_logits(params, jnp.asarray([tokens]), block), np.float64)
            logits[:, MASK] = -np.inf
            probability = np.exp(logits - logits.max(-1, keepdims=True))
            probability /= probability.sum(-1, keepdims=True)
            best = dict(zip(here, logits.argmax(-1).tolist(), strict=True))
            sure = dict(zip(here, probability.max(-1).tolist(), strict=True))
            open_ = [i for i in here if masked[i]]
            accepted = [i for i in open_ if sure[i] > threshold]
            accepted = accepted or sorted(open_, key=lambda i: -sure[i])[:1]
            edited = [
                i
                for i in here
                if not masked[i] and i >= len(prompt)
                if best[i] != tokens[i] and sure[i] > edit_threshold
            ]
            for i in accepted + edited:
                tokens[i], masked[i] = best[i], False
                replaced[i] += i in edited
            if not open_ and not edited:
                break
    start = len(prompt)
    return tokens[start : start + count], forwards, replaced[start : start + count]


@pytest.mark.parametrize("edit_threshold", [0.0, 0.15, 0.3])
@pytest.mark.parametrize("budget", [0, 3])
def test_editing_by_hand(params, edit_threshold, budget):
    prompts = [[10, 11, 12, 13, 14, 15, 16, 17, 18], [9, MASK], [30, 31, 32, 33, 34]]
    options = {"threshold": 0.2, "edit_threshold": edit_threshold, "edit_budget": budget}
    got = decode(params, prompts, stop_on_eos=False, **options)
    for row, prompt in enumerate(prompts):
        tokens, forwards, replaced = edited_by_hand(params, prompt, 6, *options.values())
        assert got.tokens[row] == tokens
        assert got.denoise_forwards[row] == forwards
        assert got.edits[row].tolist() == replaced
    assert got.edits.any() or edit_threshold == 0.3


def test_a_threshold_of_one_edits_nothing_and_looks_once_more(params):
    prompts = [[10, 11, 12, 13, 14], [9], [8] * LONGEST]
    plain = decode(params, prompts, stop_on_eos=False)
    looked = decode(params, prompts, stop_on_eos=False, edit_threshold=1.0)
    assert looked.tokens == plain.tokens and not looked.edits.any()
    blocks = np.array([2, 2, 2])  # 5 + 6, 1 + 6, 9 + 6 tokens: one more forward for each block
    np.testing.assert_array_equal(looked.denoise_forwards - plain.denoise_forwards, blocks)


# -------------------------------------------------------------------------------- the rules


accept, stop = jax.jit(Threshold.accept), jax.jit(StopOnEos.stop)
filtered = jax.jit(filter_logits)


unit = st.floats(0, 1, width=32, allow_subnormal=False)  # XLA takes subnormal numbers for 0


def blocks_of(size):
    return st.lists(st.tuples(unit, st.booleans()), min_size=size, max_size=size)


@given(
    blocks_of(1) | blocks_of(4) | blocks_of(7),
    unit,
    st.integers(1, 10),
    st.integers(0, 12),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_threshold_by_brute_force(positions, threshold, steps, step):
    confidence = np.array([c for c, _ in positions], np.float32)
    masked = np.array([m for _, m in positions])
    rule = Threshold(np.float32(threshold), jnp.asarray(even_schedule(len(positions), steps)))
    got = np.asarray(accept(rule, confidence[None], masked[None], np.array([step], np.int32)))[0]
    schedule = even_schedule(len(positions), steps)
    least = max(int(schedule[min(step, len(schedule) - 1)]), 1)
    sure = {i for i in range(len(positions)) if masked[i] and confidence[i] > threshold}
    best = sorted(np.flatnonzero(masked), key=lambda i: (-confidence[i], i))[:least]
    assert set(np.flatnonzero(got)) == (sure if len(sure) >= least else set(best))
    assert got.any() == masked.any()


def test_threshold_is_strict_and_nan_does_not_stall():
    rule = Threshold(np.float32(0.5), jnp.array([1, 1, 1]))
    half = accept(rule, np.float32([[0.5, 0.5, 0.6]]), np.ones((1, 3), bool), np.int32([0]))
    assert half.tolist() == [[False, False, True]]
    masked = np.array([[False, True, True]])
    stuck = accept(rule, np.full((1, 3), np.nan, np.float32), masked, np.int32([0]))
    assert stuck.tolist() == [[False, True, False]]


def test_even_schedule():
    assert even_schedule(8, 8).tolist() == [1] * 8
    assert even_schedule(8, 3).tolist() == [3, 3, 2, 0, 0, 0, 0, 0]
    assert even_schedule(4, 6).tolist() == [1] * 4


@pytest.mark.parametrize(
    ("tokens", "known", "late", "early"),
    [
        ([5, 3, 9, 9], [1, 1, 1, 1], True, True),
        ([5, 3, 9, 9], [1, 1, 0, 1], False, True),  # a mask after the EOS
        ([5, 3, 9, 9], [0, 1, 1, 1], False, False),  # a mask before it
        ([3, 5, 9, 9], [1, 1, 1, 1], False, False),  # the EOS is the prompt's
        ([5, 3, 9, 9], [1, 0, 1, 1], False, False),  # it stands at a mask
        ([5, 6, 9, 9], [1, 1, 1, 1], False, False),
    ],
)
def test_stop_on_eos(tokens, known, late, early):
    generated = np.array([[False, True, True, True]])
    known = np.array([known], bool)
    arguments = np.array([tokens], np.int32), known, generated
    for flag, expected in ((False, late), (True, early)):
        rule = StopOnEos(jnp.int32(3), jnp.bool_(flag))
        assert stop(rule, *arguments, known.all(-1)).tolist() == [expected]
        # A block that may still be edited ends nothing, unless stopping is early.
        assert stop(rule, *arguments, np.array([False])).tolist() == [expected and flag]


@given(
    st.integers(0, 2**31),
    st.integers(1, 12),
    st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    st.sampled_from([0.0, 0.05, 0.3, 1.0]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_filters_by_brute_force(seed, top_k, top_p, min_p):
    logits = np.random.default_rng(seed).normal(0, 2, 12).astype(np.float32)
    logits[3] = -np.inf  # as the mask's
    order = np.argsort(-logits)[: min(top_k, 11)]
    p = np.exp(logits[order].astype(np.float64))
    p /= p.sum()
    if top_p < 1:
        count = int(np.searchsorted(np.cumsum(p), top_p)) + 1
        order, p = order[:count], p[:count]
    order = order[p >= min_p * p[0]]
    got = filtered(logits, np.int32(top_k), np.float32(top_p), np.float32(min_p))
    assert set(np.flatnonzero(np.isfinite(got))) == set(order)
    np.testing.assert_array_equal(np.asarray(got)[order], logits[order])


def test_equals_of_the_last_one_kept_stay():
    logits = np.array([1.0, 0.0, 0.0, -1.0], np.float32)
    got = filtered(logits, np.int32(2), np.float32(1), np.float32(0))
    assert np.isfinite(got).tolist() == [True, True, True, False]


@given(st.integers(0, 5000))
def test_buckets_hold_and_waste_less_than_half(count):
    assert count <= bucket(count) <= max(count * 3 // 2, count)
    assert bucket(bucket(count)) == bucket(count)


# ------------------------------------------------------------------------------- the errors


@pytest.mark.parametrize(
    "field, value",
    [
        ("max_new_tokens", 0),
        ("block_size", 0),
        ("threshold", 1.5),
        ("threshold", float("nan")),
        ("steps", 0),
        ("temperature", -1.0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("min_p", 2.0),
        ("edit_threshold", 1.5),
        ("edit_budget", -1),
        ("seed", -1),
    ],
)
def test_a_bad_option_is_named(field, value):
    with pytest.raises(RequestError, match=f"{field}={value}: must be"):
        SamplerOptions(**{field: value})


def test_a_budget_for_edits_needs_a_threshold():
    with pytest.raises(RequestError, match="edit_budget=4: nothing is edited without"):
        SamplerOptions(edit_budget=4)
    assert SamplerOptions(edit_budget=4, edit_threshold=0.9).edit_budget == 4


def test_bad_requests_are_named(params):
    with pytest.raises(RequestError, match="no prompts"):
        decode(params, [])
    with pytest.raises(RequestError, match="prompt 1 has the id 61, outside the vocabulary of 61"):
        decode(params, [[1], [VOCAB]])
    with pytest.raises(RequestError, match="prompt 0: 60 tokens.*max_position_embeddings=64"):
        decode(params, [[1] * 60])
    with pytest.raises(RequestError, match="2 row_ids for 1 prompts"):
        decode(params, [[1]], [0, 1])
    bad = dataclasses.replace(SPECIAL, mask=VOCAB)
    with pytest.raises(RequestError, match="special.mask=61"):
        generate_tokens(CFG, params, [[1]], bad)
    with pytest.raises(RequestError, match="prompt 0: 60 tokens"):  # at the call, not at next()
        stream_tokens(CFG, params, [1] * 60, SPECIAL)
