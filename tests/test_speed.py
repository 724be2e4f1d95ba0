"""The chunked loss and the fast head equal the plain ones; the table's arithmetic. Nothing here is timed."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from gptlib import GptlibError, speed
from gptlib.gpt import GPT, GPTConfig
from gptlib.sampling import generate
from gptlib.speed import (
    ChunkedCrossEntropy,
    FastLoss,
    chunked_loss,
    compiled_products,
    fast_loss,
    head_loss,
    pick_softmax,
    sampling_copy,
    softmax_in_place,
    tiled_softmax_in_place,
)
from gptlib.training import plain_loss


CACHES = ("compiled_softmax", "compiled_hidden", "compiled_products")


@pytest.fixture
def fresh_caches():
    """Forget what was compiled, before and after."""
    for name in CACHES:
        getattr(speed, name).cache_clear()
    yield
    for name in CACHES:
        getattr(speed, name).cache_clear()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=203))


@pytest.fixture(scope="module")
def batch():
    return torch.randint(203, (2, 4, 16), generator=torch.Generator().manual_seed(1))


def loss_and_gradients(model, loss_fn, batch, **options):
    model.zero_grad()
    loss = loss_fn(model, *batch, **options)
    (3 * loss).backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("rows", [1, 7, 16, 63, 64, 65, 10_000])
@pytest.mark.parametrize("softmax", ["plain", "tiled"])
def test_equal_to_plain_loss_in_fp32(model, batch, rows, softmax):
    expected, gradients = loss_and_gradients(model, plain_loss, batch)
    loss, found = loss_and_gradients(
        model, chunked_loss, batch, rows=rows, softmax=softmax
    )
    assert torch.allclose(loss, expected, atol=1e-5, rtol=0)
    for a, b in zip(found, gradients):
        assert torch.allclose(a, b, atol=1e-5, rtol=0)


def test_compiled_or_its_fallback_is_equal(model, batch):
    expected, gradients = loss_and_gradients(model, plain_loss, batch)
    for rows in (64, 24, 7):
        loss, found = loss_and_gradients(
            model, chunked_loss, batch, rows=rows, softmax="compiled"
        )
        assert torch.allclose(loss, expected, atol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, gradients))


def test_without_a_compiler_one_line_and_the_same_value(
    model, batch, monkeypatch, capsys, fresh_caches
):
    def broken(*args, **kwargs):
        def call(*args):
            raise RuntimeError("no C++ compiler\nand a long story")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    expected, _ = loss_and_gradients(model, plain_loss, batch)
    for _ in range(2):
        loss, _ = loss_and_gradients(model, chunked_loss, batch, softmax="compiled")
        assert torch.allclose(loss, expected, atol=1e-5)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "no C++ compiler" in said[0]


@pytest.mark.parametrize("wrong", ["value", "gradient"])
def test_compiled_code_that_computes_wrongly_is_not_used(
    model, batch, monkeypatch, capsys, fresh_caches, wrong
):
    def miscompile(function, **options):
        def call(*args):
            if function is GPT.hidden and wrong == "value":
                return 1.1 * function(*args)
            if function is GPT.hidden:
                x = function(*args)
                return x.detach() + 0.9 * (x - x.detach())  # right, with a wrong slope
            result = function(*args)
            if function is speed.softmax_in_place and wrong == "gradient":
                args[0].mul_(0.9)
                return result
            return 0.9 * result

        return call

    monkeypatch.setattr(torch, "compile", miscompile)
    expected, gradients = loss_and_gradients(model, plain_loss, batch)
    loss, found = loss_and_gradients(model, FastLoss(True, True), batch)
    assert torch.allclose(loss, expected, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, gradients))
    assert sampling_copy(model) is model
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all("wrong by up to" in line for line in said)


# in a process of its own, since PyTorch looks at the instructions once
MIXED = """
import os, sys, torch, gptlib.speed as speed
z = torch.randn(40, 203, generator=torch.Generator().manual_seed(0))
expected = z.logsumexp(-1).sum()
for folder, compiler in (("shared", torch.compile), ("apart", speed.compile_apart)):
    if folder in sys.argv:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(sys.argv[1], folder)
        speed.compile_apart = compiler
        speed.compiled_softmax.cache_clear()
        torch._dynamo.reset()
        found = speed.pick_softmax("compiled", z)(z.clone()).sum()
        print(folder, (found / expected).item(), torch.backends.cpu.get_cpu_capability())
"""


@pytest.fixture
def compiler():
    """Skips the test where nothing can be compiled."""
    if compiled_products(torch.Size([203, 32]), torch.float32) is None:
        pytest.skip("no compiler here that can be trusted")


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("filled", "used"), [("AVX512", "AVX2"), ("AVX2", "DEFAULT")])
def test_a_compiler_cache_of_other_instructions(tmp_path, filled, used):
    """A cache filled under AVX-512 and used under AVX2 once gave half of the loss.

    One filled under AVX2 and used without vectors does not compile.
    """
    order = ["DEFAULT", "AVX2", "AVX512"]
    here = torch.backends.cpu.get_cpu_capability()
    if here not in order or order.index(filled) > order.index(here):
        pytest.skip(f"this processor has no {filled}")

    def ratios(*folders, capability):
        env = {"ATEN_CPU_CAPABILITY": capability.lower()}
        code = [sys.executable, "-c", MIXED, str(tmp_path), *folders]
        done = subprocess.run(
            code, env=os.environ | env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return [line.split() for line in done.stdout.splitlines()], done.stderr

    (row,), said = ratios("apart", capability=filled)
    assert (float(row[1]), row[2], said) == (pytest.approx(1), filled, "")
    (folder,) = (tmp_path / "apart").iterdir()
    shutil.copytree(folder, tmp_path / "shared")  # as if the folder did not tell
    rows, said = ratios("shared", "apart", capability=used)
    for row in rows:  # in the shared one only the check is left
        assert (float(row[1]), row[2]) == (pytest.approx(1), used)
    (line,) = said.splitlines()  # of the shared one alone
    assert line.startswith("torch.compile is not used for the softmax: ")
    assert ("wrong by up to" if used == "AVX2" else "CppCompileError") in line
    assert len(rows) == len(list((tmp_path / "apart").iterdir())) == 2


@pytest.mark.parametrize("softmax", ["plain", "tiled"])
def test_bf16_is_as_close_as_plain_bf16(model, batch, softmax):
    exact_loss, exact = loss_and_gradients(model, plain_loss, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain_value, plain = loss_and_gradients(model, plain_loss, batch)
        value, found = loss_and_gradients(
            model, chunked_loss, batch, rows=24, softmax=softmax
        )
    assert value.dtype == torch.float32
    assert abs(value - exact_loss) < max(0.02, 2 * abs(plain_value - exact_loss))

    def error(gradients):
        return max(((a - b).norm() / b.norm()).item() for a, b in zip(gradients, exact))

    assert all(g.dtype == torch.float32 for g in found)
    assert error(found) < max(2 * error(plain), 0.03)


@pytest.mark.parametrize("softmax", ["plain", "tiled"])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_gradcheck_in_float64(softmax, rows):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(
        7, 4, dtype=torch.float64, generator=generator, requires_grad=True
    )
    weight = torch.randn(
        11, 4, dtype=torch.float64, generator=generator, requires_grad=True
    )
    targets = torch.randint(11, (7,), generator=generator)
    assert torch.autograd.gradcheck(
        lambda h, w: ChunkedCrossEntropy.apply(h, w, targets, rows, softmax),
        (hidden, weight),
    )


@torch.no_grad()
def test_no_grad_is_equal_and_leaves_no_graph(model, batch):
    expected = plain_loss(model, *batch)
    for rows in (1, 7, 64, 1000):
        loss = chunked_loss(model, *batch, rows=rows)
        assert torch.allclose(loss, expected, atol=1e-5) and not loss.requires_grad


@pytest.mark.parametrize("softmax", ["plain", "tiled"])
def test_extreme_logits_stay_finite(softmax):
    logits = torch.tensor([[1e4, 0.0, -1e4], [88.0, 89.0, 90.0]])
    expected = logits.logsumexp(-1, keepdim=True), logits.softmax(-1)
    log_total = pick_softmax(softmax, logits)(logits)
    assert torch.allclose(log_total, expected[0])
    assert torch.allclose(logits, expected[1], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tiles_of_any_size(dtype):
    z = torch.randn(19, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    probs = z.clone()
    log_total = softmax_in_place(probs)
    for rows in (1, 4, 19, 100):
        buffer = z.clone()
        found = tiled_softmax_in_place(buffer, rows=rows)
        assert torch.allclose(found, log_total) and found.dtype == log_total.dtype
        assert torch.allclose(buffer, probs, atol=1e-6 if dtype.itemsize > 2 else 4e-3)


def test_the_targets_part_of_a_bf16_gradient_is_not_rounded():
    """p - 1 in bf16 is -1 for all p below 1/512; so 1 is subtracted elsewhere."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 64, generator=generator, requires_grad=True)
    weight = (0.05 * torch.randn(2000, 64, generator=generator)).requires_grad_()
    targets = torch.randint(2000, (40,), generator=generator)
    exact = torch.autograd.grad(
        torch.nn.functional.cross_entropy(hidden @ weight.T, targets), (hidden, weight)
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = head_loss(hidden, weight, targets, rows=16)
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), exact):
        assert (a - b).norm() < 5e-4 * b.norm()  # 2e-3 if it is rounded


def test_hidden_and_weight_may_have_different_types():
    """Without autocast; the gradients have the types of what they belong to."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=generator, requires_grad=True)
    hidden = torch.randn(20, 8, generator=generator).bfloat16().requires_grad_()
    targets = torch.randint(50, (20,), generator=generator)
    found = torch.autograd.grad(head_loss(hidden, weight, targets), (hidden, weight))
    loss = torch.nn.functional.cross_entropy(hidden.float() @ weight.T, targets)
    for a, b in zip(found, torch.autograd.grad(loss, (hidden, weight))):
        assert a.dtype == b.dtype and (a - b).float().norm() < 0.01 * b.float().norm()


def test_accumulation_equals_the_large_batch(model, batch):
    _, whole = loss_and_gradients(model, chunked_loss, batch)
    model.zero_grad()
    for x, y in zip(batch[0].split(2), batch[1].split(2)):
        (3 * chunked_loss(model, x, y, rows=5) / 2).backward()
    assert all(
        torch.allclose(p.grad, g, atol=1e-5) for p, g in zip(model.parameters(), whole)
    )


@pytest.mark.parametrize("softmax", ["plain", "tiled"])
def test_fp16_keeps_the_small_probabilities(softmax):
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=32, vocab_size=50_304)
    )
    batch = torch.randint(50_304, (2, 40, 32))
    _, exact = loss_and_gradients(model, plain_loss, batch)
    with torch.autocast("cpu", dtype=torch.float16):
        _, found = loss_and_gradients(
            model, chunked_loss, batch, rows=512, softmax=softmax
        )
    absent = torch.ones(50_304, dtype=torch.bool)
    absent[batch.flatten()] = False  # tokens that are only pushed down
    a, b = found[0][absent], exact[0][absent]
    assert b.norm() > 0 and ((a - b).norm() / b.norm()).item() < 0.05


def test_fast_loss_is_chosen_by_vocabulary_and_says_what_it_is():
    assert fast_loss(50_304, "cuda") == FastLoss(chunked=True, compiled=True)
    assert fast_loss(50_304) == FastLoss(chunked=True, compiled=False)
    assert fast_loss(2_048) == FastLoss(chunked=False, compiled=False)
    assert str(fast_loss(50_304)) == "FastLoss(chunked=True, compiled=False)"


@pytest.mark.parametrize("chunked", [True, False])
def test_compiled_blocks_compute_the_same_and_keep_their_names(batch, chunked):
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=203)
    )
    names = list(model.state_dict())
    expected, gradients = loss_and_gradients(model, plain_loss, batch)
    loss, found = loss_and_gradients(model, FastLoss(chunked, compiled=True), batch)
    assert torch.allclose(loss, expected, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, gradients))
    assert list(model.state_dict()) == names, (
        "the compiled module's names must not reach a checkpoint"
    )


def test_bad_options(model, batch):
    with pytest.raises(GptlibError, match="rows is 0"):
        chunked_loss(model, *batch, rows=0)
    with pytest.raises(GptlibError, match="unknown softmax 'fused'; there are plain"):
        chunked_loss(model, *batch, softmax="fused")


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_sampling_copy(bias):
    torch.manual_seed(0)
    config = GPTConfig(
        n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=203, bias=bias
    )
    model = GPT(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.normal_()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    for n in (1, 5):
        tokens = torch.randint(203, (n, n), generator=torch.Generator().manual_seed(0))
        expected = model(tokens)[0]
        assert torch.allclose(sampling_copy(model)(tokens)[0], expected, atol=1e-5)
        rounded = sampling_copy(model, dtype=torch.bfloat16)(tokens)[0]
        assert rounded.shape == expected.shape and rounded.dtype == torch.float32
        assert torch.allclose(rounded, expected, rtol=0.02, atol=0.05)
        assert not torch.equal(rounded, expected)
    for n in (1, 2):
        texts = [
            generate(
                m,
                torch.zeros(n, 3, dtype=torch.int64),
                40,
                generator=torch.Generator().manual_seed(1),
            )
            for m in (model, sampling_copy(model))
        ]
        assert torch.equal(*texts)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters()), (
        "the model can still be trained"
    )


@pytest.mark.usefixtures("compiler")
def test_a_sampling_copy_is_a_module_that_moves_as_a_whole(model):
    copy = sampling_copy(model)
    tokens = torch.randint(203, (1, 1))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    wide = copy.to(torch.float64)
    assert all(t.dtype == torch.float64 for t in wide.state_dict().values())
    with torch.no_grad():
        assert torch.allclose(wide(tokens)[0].float(), model(tokens)[0], atol=1e-5)
    for name, p in model.state_dict().items():
        assert p.dtype == torch.float32 and torch.equal(p, before[name])


@torch.no_grad()
def test_a_sampling_copy_in_the_same_type_follows_the_model():
    torch.manual_seed(0)
    config = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=203)
    model, tokens = GPT(config).eval(), torch.randint(203, (1, 1))
    copy = sampling_copy(model)
    for p in model.parameters():
        p.add_(0.1 * torch.randn_like(p))
    assert torch.allclose(copy(tokens)[0], model(tokens)[0], atol=1e-4)


def test_without_a_compiler_the_model_itself_samples(model, monkeypatch):
    monkeypatch.setattr(speed, "compiled_products", lambda *_: None)
    assert sampling_copy(model, dtype=torch.bfloat16) is model
