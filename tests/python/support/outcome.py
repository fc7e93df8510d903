"""Compares what a transfer run answered with what a single engine answers to the same requests."""

# The same sums in another order: measured differences are 0 to 1e-5 in float32.
LOGPROB_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


def logprob_difference(choice, expected):
    """The largest difference of log-probabilities up to the first token that differs; that token's is included if
    the token is the same."""
    largest = 0.0
    for token, wanted, ours, theirs in zip(
        choice["tokens"], expected["tokens"], choice["logprobs"], expected["logprobs"], strict=False
    ):
        if token != wanted:
            break
        largest = max(largest, abs(ours - theirs))
    return largest


def assert_same(result, first_run, second_run, dtype="float32", what=""):
    """Claims that `result` is what a single engine answers. The engine's two runs of the same load are the control:
    where they agree the whole text must be equal, otherwise the first token."""
    assert len(result["choices"]) == len(first_run["choices"]), what
    for index, choice in enumerate(result["choices"]):
        control, again = first_run["choices"][index], second_run["choices"][index]
        label = f"{what} choice {index}: {choice['tokens']} instead of {control['tokens']}"
        assert choice["finish_reason"] == control["finish_reason"], f"{label}, {choice['finish_reason']}"
        assert choice["tokens"][0] == control["tokens"][0], label
        assert abs(choice["logprobs"][0] - control["logprobs"][0]) <= LOGPROB_TOLERANCE[dtype], label
        if dtype == "float32" and control["tokens"] == again["tokens"]:
            assert choice["tokens"] == control["tokens"], label
            difference = logprob_difference(choice, control)
            assert difference <= LOGPROB_TOLERANCE[dtype], f"{label}, log-probabilities differ by {difference}"


def whole_prompt_tokens(prompt_tokens, local_tokens=0):
    """Tokens of a prompt that vLLM counts as external when prefill hands all of them over, a block that is not full
    included, and the server had the first `local_tokens` itself. The last one is among them although vLLM computes it
    again to sample. Where only that one is missing nothing is asked for."""
    return prompt_tokens - local_tokens if local_tokens < prompt_tokens - 1 else 0


def full_blocks_tokens(prompt_tokens, block_tokens):
    """Tokens of a prompt whose KV can come from a store: whole blocks, and at least one token is left to compute."""
    return (prompt_tokens - 1) // block_tokens * block_tokens
