"""One attached model, several threads: each call has its own language ids."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from shifcon_fast.modeling.attach import attach

CALLS = 150


@pytest.fixture(autouse=True)
def hasty_switches() -> Iterator[None]:
    """Threads take turns as often as Python lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def _in_threads(*calls: Callable[[], Tensor]) -> list[list[Tensor]]:
    """What each call returns, again and again, while the others run beside it."""
    results: list[list[Tensor]] = [[] for _ in calls]
    start = threading.Barrier(len(calls))

    def work(index: int) -> None:
        torch.set_grad_enabled(False)  # of this thread
        start.wait()
        for _ in range(CALLS):
            results[index].append(calls[index]())

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("architecture", ["bloom", "gpt_neox", "llama"])
def test_threads_do_not_see_each_others_ids(architecture, tiny_model, random_space):
    model = tiny_model(architecture, layers=3)
    attach(model, random_space(model), forward=1, backward=2)
    tokens = torch.randint(3, 128, (2, 5), generator=torch.Generator().manual_seed(2))
    ids = [torch.tensor([1, 0]), torch.tensor([0, 1]), None]

    def call(language_ids: Tensor | None) -> Tensor:
        if language_ids is None:
            with model.shifcon.suspended():
                return model(tokens, language_ids=ids[0]).logits
        return model(tokens, language_ids=language_ids).logits

    with torch.no_grad():
        expected = [call(each) for each in ids]
    assert all((expected[0] - other).abs().max() > 1e-3 for other in expected[1:])
    found = _in_threads(*(lambda each=each: call(each) for each in ids))
    wrong = [
        sum(not torch.allclose(result, right, atol=1e-5) for result in results)
        for results, right in zip(found, expected, strict=True)
    ]
    assert wrong == [0, 0, 0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_block_gets_the_ids_of_its_forward(
    reentrant, tiny_model, random_space, batch, batch_ids
):
    """Backward runs after, and in between, other calls; Bloom's ids are not among its decoder's arguments."""
    model = tiny_model("bloom").train()
    attach(model, random_space(model), forward=1, backward=3)
    model.enable_input_require_grads()

    def gradient(*, disturbed: bool) -> Tensor:
        model.zero_grad()
        loss = model(**batch, language_ids=batch_ids, use_cache=False).logits.square().mean()
        if disturbed:
            with torch.no_grad():
                model(**batch, language_ids=batch_ids.flip(0))
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        return model.transformer.h[0].mlp.dense_h_to_4h.weight.grad.clone()

    expected = gradient(disturbed=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.testing.assert_close(gradient(disturbed=True), expected)
