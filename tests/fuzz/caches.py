"""Caches in any order of operations, generation, streams and switched Llamas, against each text read alone."""

import copy
import tempfile
from pathlib import Path

import torch
from checks import assert_close
from safetensors.torch import load, save
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_longnet import DilatedCache, LongNetCache, LongNetForCausalLM, stream, use_dilated_attention
from modeling_longnet.testing import CACHE

from .attention import draw_branches
from .engine import Draw
from .models import EXACT, VOCABULARY, Row, draw_layout, make_model, reference


class _CacheProgram:
    """A cache, and what each of its rows has read: the operations change both alike."""

    def __init__(self, draw: Draw):
        self.draw, self.net = draw, make_model(draw, is_causal=True)
        self.cache = self.new_cache()
        self.start(draw.integer(1, 3))

    def new_cache(self) -> LongNetCache:
        draw = self.draw
        return LongNetCache(self.net.config, max_length=draw.choice([None, None, 1, 9, 200]), offloading=draw.flag(0.2))

    def start(self, rows: int) -> None:
        self.texts: list[list[int]] = [[] for _ in range(rows)]
        self.masks: list[list[int]] = [[] for _ in range(rows)]

    def feed(self) -> None:
        """New columns: tokens, left padding before a row's first token, right padding after its last."""
        draw, count = self.draw, self.draw.choice([1, 1, 1, 2, 3, 5, 9, 20])
        before = [len(text) for text in self.texts]
        ids = torch.randint(VOCABULARY, (len(self.texts), count))
        for row, (text, mask) in enumerate(zip(self.texts, self.masks, strict=True)):
            begin, end = 0, count
            if not text and (mask or draw.flag(0.3)):
                begin = draw.integer(0, count)
            if text and not mask[-1]:
                end = 0
            elif begin < count and draw.flag(0.04):
                end = draw.integer(begin, count)
            new = [int(begin <= column < end) for column in range(count)]
            mask += new
            text += ids[row, begin:end].tolist()
        every = [flag for mask in self.masks for flag in mask]
        explicit = not all(every) or draw.flag(0.3)
        inputs = {"attention_mask": torch.tensor(self.masks)} if explicit else {}
        mode = draw.choice([torch.no_grad, torch.no_grad, torch.enable_grad, torch.inference_mode])
        draw.note("feed", (count, mode.__name__, self.masks))
        with mode():
            hidden = self.net(ids, **inputs, **{CACHE: self.cache}).last_hidden_state
        self.check(hidden.detach().clone(), before, count)

    def check(self, hidden: Tensor, before: list[int], count: int) -> None:
        """The new tokens' hidden states are those of each text alone, from its beginning."""
        with reference(self.net), torch.no_grad():
            for row, text in enumerate(self.texts):
                new = len(text) - before[row]
                if new:
                    expected = self.net(torch.tensor([text])).last_hidden_state[0, -new:]
                    first = self.masks[row][-count:].index(1)
                    assert_close(f"row {row}", hidden[row, first : first + new], expected, EXACT)
        assert self.cache.get_seq_length() == len(self.masks[0])

    def crop(self) -> None:
        draw, columns = self.draw, len(self.masks[0])
        back = draw.integer(0, min(columns + 1, draw.choice([3, 60])))
        target = draw.choice([-back, columns - back]) if back < columns else -back
        draw.note("crop", target)
        try:
            self.cache.crop(torch.tensor(target) if draw.flag(0.2) else target)
        except ValueError as error:
            if self._is_easy(back) or f"crop({target})" not in str(error):
                raise AssertionError("refused without need, or without saying what") from error
            return
        for row, mask in enumerate(self.masks):
            kept = mask[: columns - back]
            self.masks[row], self.texts[row] = kept, self.texts[row][: sum(kept)]

    def _is_easy(self, back: int) -> bool:
        """No padding, no segment ended within the last `back` columns, and no window moved past what they saw."""
        lengths, branches = [len(text) for text in self.texts], {b for x in self.cache.layers for b in x.branches}
        whole = all(flag for mask in self.masks for flag in mask) and back <= len(self.masks[0])

        def keeps(branch, t: int) -> bool:
            if branch.is_window:  # tokens before t - w were overwritten
                return max(0, t - back - branch.w + 1) >= t - branch.w
            return (t + branch.phase) // branch.w == (t - back + branch.phase) // branch.w

        return whole and all(keeps(b, t) for t in lengths for b in branches)

    def select(self) -> None:
        """Reorder, repeat or select rows."""
        draw, count = self.draw, len(self.texts)
        kind = draw.choice(["reorder", "repeat", "select", "mask"])
        if kind == "repeat":
            times = draw.integer(1, 2)
            rows = [row for row in range(count) for _ in range(times)]
            self.cache.batch_repeat_interleave(times)
        elif kind == "mask":
            chosen = [draw.flag() for _ in range(count)]
            chosen[draw.integer(0, count - 1)] = True
            rows = [row for row in range(count) if chosen[row]]
            self.cache.batch_select_indices(torch.tensor(chosen))
        else:
            rows = [draw.integer(0, count - 1) for _ in range(count if kind == "reorder" else draw.integer(1, 3))]
            index = torch.tensor(rows)
            self.cache.reorder_cache(index) if kind == "reorder" else self.cache.batch_select_indices(index)
        draw.note(kind, rows)
        if not self.cache.layers[0].is_initialized:  # takes a batch of any size
            return
        rows = rows[:6]
        self.cache.batch_select_indices(torch.arange(len(rows)))
        self.texts, self.masks = [[*self.texts[r]] for r in rows], [[*self.masks[r]] for r in rows]

    def restart(self) -> None:
        """Reset, in place: the rows stay."""
        self.draw.note("reset", "")
        self.cache.reset()
        self.start(len(self.texts))

    def store(self) -> None:
        """Save, and load into another cache, whatever that one held."""
        if not self.cache.layers[0].is_initialized:
            return
        self.draw.note("save and load", "")
        tensors = load(save(self.cache.to_tensors()))
        if self.draw.flag():
            self.cache = self.new_cache()
            if self.draw.flag():
                with torch.no_grad():
                    self.net(torch.zeros(2, 3, dtype=torch.int64), **{CACHE: self.cache})
        self.cache.load_tensors(tensors)

    def other(self) -> None:
        kind = self.draw.choice(["copy", "offload", "prefetch", "record", "eager", "sdpa"])
        self.draw.note(kind, "")
        if kind == "copy":
            self.cache = copy.deepcopy(self.cache)
        elif kind == "record":
            self.cache.activate_past_recording()
        elif kind in ("eager", "sdpa"):
            self.net.set_attn_implementation(kind)
        else:
            for layer in self.cache.layers:
                getattr(layer, kind)()


def cache(draw: Draw) -> None:
    """A program of operations on a cache; every feed is compared with each text read alone."""
    program = _CacheProgram(draw)
    operations = [program.feed] * 5 + [program.crop] * 2
    operations += [program.select, program.store, program.restart, program.other, program.other]
    for _ in range(draw.integer(1, 10)):
        draw.choice(operations)()
    program.feed()


def generation(draw: Draw) -> None:
    """`generate` on ragged prompts: with the cache as without one, greedy, by beams, sampled or with drafts."""
    net = make_model(draw, LongNetForCausalLM, is_causal=True, pad_token_id=0)
    width, batch = draw.integer(1, 20), draw.integer(1, 3)
    mask = torch.ones(batch, width, dtype=torch.int64)
    for row in range(batch):
        mask[row, : draw.integer(0, width - 1)] = 0
    options = draw.choice([{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"prompt_lookup_num_tokens": 3}])
    if "prompt_lookup_num_tokens" in options:
        mask = mask[:1]
    ids = torch.randint(1, VOCABULARY, (len(mask), width))
    options = options | {"max_new_tokens": draw.integer(1, 25), "eos_token_id": None, "attention_mask": mask}
    draw.note("generate", (options, mask.tolist()))
    results = []
    for cached in (False, True):
        torch.manual_seed(0)
        given = {k: v for k, v in options.items() if cached or not k.startswith("prompt")}
        how = {"cache_implementation": "offloaded"} if cached and draw.flag(0.2) else {}
        results.append(net.generate(ids, use_cache=cached, **given, **how))
    assert torch.equal(*results), f"without a cache {results[0].tolist()}, with one {results[1].tolist()}"


def reading(draw: Draw) -> None:
    """`stream` in chunks, stopped and resumed from its file, against one forward pass."""
    net = make_model(draw, LongNetForCausalLM, is_causal=True)
    tokens = torch.randint(VOCABULARY, (draw.integer(2, 120),))
    with reference(net), torch.no_grad():
        logits = net(tokens[None]).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0].float()
    total, parts = 0.0, [torch.full_like(expected, torch.nan)]
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        for _ in range(draw.integer(1, 4)):
            size, stop = draw.integer(1, 50), draw.integer(1, 4)
            draw.note("chunk size and chunks", (size, stop))
            text = tokens.to(draw.choice([torch.int64, torch.int32, torch.uint8]))
            reader = stream(net, text, chunk_size=size, state_file=state, save_seconds=0, progress=False)
            for count, scored in enumerate(reader, 1):
                parts[0][scored.start - 1 : scored.stop - 1] = scored.log_probs
                if count == stop:
                    break
            reader.close()
        for scored in stream(net, tokens, state_file=state, progress=False):
            parts[0][scored.start - 1 : scored.stop - 1] = scored.log_probs
            total = scored.total
        left = [path.name for path in Path(folder).iterdir()]
    assert left in ([], ["state"]), left
    assert_close("log_probs", parts[0], expected, 1e-5)
    assert total == 0.0 or abs(total - float(expected.double().sum())) < 1e-4 * len(tokens)


def switched(draw: Draw) -> None:
    """A Llama with dilated attention: padded and packed batches, its own cache and the bounded one."""
    lengths, rates = draw_branches(draw)
    heads = draw.choice([2, 4, 6])
    sizes = {
        "hidden_size": 4 * heads, "intermediate_size": 9, "num_hidden_layers": draw.integer(1, 2),
        "num_attention_heads": heads, "num_key_value_heads": draw.choice([1, 2]), "vocab_size": VOCABULARY,
    }  # fmt: skip
    net = LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0)).double().eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.mul_(20 if "q_proj" in name or "k_proj" in name else 1)
    draw.note("llama", (sizes, lengths, rates))
    offsets = draw.choice(["interleaved", "blocked"])
    use_dilated_attention(net, lengths, rates, head_offsets=offsets, backend="eager")
    rows, inputs, width = draw_layout(draw)
    draw.note("documents", rows)
    ids = torch.randint(VOCABULARY, (1 + max(row for row, *_ in rows), width))
    with torch.no_grad():
        expected = [net(ids[r : r + 1, a:b]).logits[0] for r, a, b in rows]
        use_dilated_attention(net, backend="torch")
        if "attention_mask" in inputs:  # positions count from a text's first token, as `generate` makes them
            inputs["position_ids"] = (inputs["attention_mask"].long().cumsum(1) - 1).clamp(min=0)
        logits = net(ids, **inputs).logits
        _compare_rows("one pass", logits, rows, expected)
        if "attention_mask" not in inputs and inputs:
            return  # packed documents and a cache exclude each other
        bounded = draw.flag()
        cache, parts, begin = DilatedCache(net) if bounded else None, [], 0
        draw.note("bounded cache", bounded)
        while begin < width:
            end = min(width, begin + draw.choice([1, 1, 2, 5, 17]))
            mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
            given = {} if mask is None else {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
            output = net(ids[:, begin:end], use_cache=True, **{CACHE: cache}, **given)
            cache, begin = output[CACHE], end
            parts.append(output.logits)
    _compare_rows("with a cache", torch.cat(parts, 1), rows, expected)


def _compare_rows(name: str, actual: Tensor, rows: list[Row], expected: list[Tensor]) -> None:
    for (row, a, b), wanted in zip(rows, expected, strict=True):
        assert_close(f"{name}: row {row}, {a}:{b}", actual[row, a:b], wanted, EXACT)


CASES = {"cache": cache, "generation": generation, "reading": reading, "switched": switched}
