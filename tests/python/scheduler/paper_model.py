"""A model that can be computed on paper, with a real KV cache in vLLM's layout.

The KV entry of a token is a number that depends on the token and on the entries of all tokens before it, read back
from the cache in every layer, as attention reads them. The next token is a function of the last entry. So a wrong,
missing or half-written block anywhere in a prefix gives another answer, and the right one is known without a cache.
"""

import torch

FIRST_TOKEN = 3
VOCABULARY = 290
LAYERS = 3
HEADS = 2
HEAD_DIM = 8
LAYER_NAMES = [f"model.layers.{layer}.self_attn.attn" for layer in range(LAYERS)]

# Entries stay below 2**18, so float32 holds entry + offset exactly and float64 sums are exact too.
ENTRIES = 1 << 18
# What a block holds before anything was written: no sum of real entries gives the same answer.
POISON = -12345.0
_ROW_VALUES = 2 * HEADS * HEAD_DIM


def expected_tokens(prompt, count):
    """The model's greedy answer to a prompt."""
    tokens = list(prompt)
    context, entry = 0, 0
    answer = []
    for position in range(len(prompt) + count - 1):
        entry = _entry(context, tokens[position])
        context += (position + 1) * _row_sum(entry)
        if position >= len(prompt) - 1:
            answer.append(_next_token(entry))
            tokens.append(answer[-1])
    return answer


class PaperCache:
    """The KV tensors, as vLLM's CPU backend of this version lays them out."""

    def __init__(self, blocks, block_tokens, keys_outermost):
        self.block_tokens = block_tokens
        self._keys_outermost = keys_outermost
        if keys_outermost:
            shape = (2, blocks, HEADS, block_tokens, HEAD_DIM)
            self.tensors = {name: torch.full(shape, POISON) for name in LAYER_NAMES}
        else:
            storage = torch.full((LAYERS, blocks, HEADS, block_tokens, 2 * HEAD_DIM), POISON)
            self.tensors = {name: storage[layer] for layer, name in enumerate(LAYER_NAMES)}

    def write(self, layer, block_ids, start, entries):
        positions = range(start, start + len(entries))
        blocks = [block_ids[position // self.block_tokens] for position in positions]
        slots = [position % self.block_tokens for position in positions]
        tensor, rows = self._tensor(layer), _rows(layer, entries)
        if self._keys_outermost:
            tensor[:, blocks, :, slots] = rows.view(-1, 2, HEADS, HEAD_DIM)
        else:
            tensor[blocks, :, slots] = rows.view(-1, HEADS, 2 * HEAD_DIM)

    def context(self, block_ids, count):
        """What attention over the first `count` tokens sees."""
        if count == 0:
            return 0
        blocks = block_ids[: -(-count // self.block_tokens)]
        weights = torch.arange(1, count + 1, dtype=torch.float64)
        total = 0
        for layer in range(LAYERS):
            tensor = self._tensor(layer)
            if self._keys_outermost:
                rows = tensor[:, blocks].permute(1, 3, 0, 2, 4).reshape(-1, _ROW_VALUES)
            else:
                rows = tensor[blocks].permute(0, 2, 1, 3).reshape(-1, _ROW_VALUES)
            total += int((rows[:count].double().sum(dim=1) * weights).sum())
        return total

    def first_bytes(self, layer, block):
        """The first bytes of a block in one layer, by which a test finds it in a file."""
        tensor = self._tensor(layer)
        head = tensor[0, block, 0, 0] if self._keys_outermost else tensor[block, 0, 0]
        return head.contiguous().numpy().tobytes()

    def scribble(self, block):
        """Overwrites a block, as a load that went wrong half-way may have."""
        for layer in range(LAYERS):
            tensor = self._tensor(layer)
            (tensor[:, block] if self._keys_outermost else tensor[block]).fill_(POISON)

    def _tensor(self, layer):
        return self.tensors[LAYER_NAMES[layer]]


def compute(cache, block_ids, tokens, start, end, after_layer=lambda layer: None):
    """Computes tokens[start:end] and returns the token that follows `end`. Everything before `start` comes from the
    cache. `after_layer` is called when a layer's entries are in the cache."""
    context = cache.context(block_ids, start)
    entries = []
    for position in range(start, end):
        entries.append(_entry(context, tokens[position]))
        context += (position + 1) * _row_sum(entries[-1])
    for layer in range(LAYERS):
        cache.write(layer, block_ids, start, entries)
        after_layer(layer)
    return _next_token(entries[-1])


def _entry(context, token):
    return (context * 2654435761 + token * 40503 + 7) % ENTRIES


def _next_token(entry):
    return FIRST_TOKEN + (entry * 48271 + 11) % (VOCABULARY - FIRST_TOKEN)


def _rows(layer, entries):
    offsets = torch.arange(_ROW_VALUES, dtype=torch.float32) + layer * _ROW_VALUES
    return torch.tensor(entries, dtype=torch.float32).unsqueeze(1) + offsets


def _row_sum(entry):
    values = LAYERS * _ROW_VALUES
    return values * entry + values * (values - 1) // 2
