"""Devices and precisions, with answers put in place of machines that are not here."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gptlib import GptlibError
from gptlib.training import Precision
from gptlib.workshop import devices
from gptlib.workshop.devices import (
    DeviceError,
    check_against_cpu,
    cpu_has_bf16,
    cpu_information,
    describe_code,
    describe_machine,
    is_out_of_memory,
    peak_flops,
    peak_memory,
    pick_device,
    pick_precision,
    total_memory,
)


CPU, CUDA = torch.device("cpu"), torch.device("cuda")
INTEL, AMD = {"vendor_id": "GenuineIntel"}, {"vendor_id": "AuthenticAMD"}


def test_devices_by_name(monkeypatch):
    assert pick_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device() == CPU
    with pytest.raises(DeviceError, match="no CUDA device here; use --device cpu"):
        pick_device("cuda")
    for name in ("gpu", "meta", "cpu:x"):
        with pytest.raises(GptlibError, match=f"unknown device '{name}'; there are"):
            pick_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="no MPS device"):
        pick_device("mps")


def test_cuda_devices_are_counted_from_0(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device() == CUDA and pick_device("cuda:1").index == 1
    with pytest.raises(DeviceError, match="no device cuda:2; there are 2"):
        pick_device("cuda:2")


def test_a_device_that_computes_wrongly_is_refused(monkeypatch):
    check_against_cpu(CPU)
    real, calls = torch.nn.functional.scaled_dot_product_attention, iter((1.0, 1.01))
    wrong = lambda *args, **options: real(*args, **options) * next(calls)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", wrong)
    with pytest.raises(DeviceError, match="off the CPU's"):
        check_against_cpu(CPU)


@pytest.mark.parametrize(
    ("information", "bf16"),
    [
        (INTEL | {"flags": "avx2 avx512_bf16 amx_bf16 amx_tile"}, True),
        (INTEL | {"flags": "avx2 avx512f avx512_bf16 avx512_fp16"}, False),
        (INTEL | {"flags": "avx2"}, False),
        (AMD | {"flags": "avx2 avx512_bf16"}, True),
        (AMD | {"flags": "avx2 avx512f"}, False),
        ({"Features": "asimd bf16"}, False),
        ({}, False),
    ],
)
def test_precision_on_the_cpu_is_decided_by_instructions(
    information, bf16, monkeypatch
):
    """Plain AVX-512 bf16 on Intel multiplied ten times slower than fp32."""
    assert cpu_has_bf16(information)[0] == bf16
    monkeypatch.setattr(devices, "cpu_information", lambda: information)
    clock = "a stopwatch decides nothing"
    monkeypatch.setattr("time.perf_counter", lambda: pytest.fail(clock))
    for kernels, has in (("AVX512", bf16), ("AVX2", False)):  # of PyTorch
        monkeypatch.setattr(
            torch.backends.cpu, "get_cpu_capability", lambda it=kernels: it
        )
        assert pick_precision(CPU).name == ("bf16" if has else "fp32")


def test_linux_tells_about_its_processor(tmp_path):
    text = "processor\t: 0\nmodel name\t: Fast One\nflags\t\t: a b\n\nprocessor\t: 1\n"
    (tmp_path / "cpuinfo").write_text(text)
    found = cpu_information(tmp_path / "cpuinfo")
    assert found == {"processor": "0", "model name": "Fast One", "flags": "a b"}
    assert cpu_information(tmp_path / "none") == {}


@pytest.mark.parametrize(
    ("capability", "sound", "name"),
    [((9, 0), True, "bf16"), ((8, 0), True, "bf16"), ((7, 5), True, "fp16")]
    + [((7, 5), False, "fp32"), ((6, 1), True, "fp32")],
)
def test_precision_on_cuda_is_decided_by_capability(
    capability, sound, name, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(devices, "fp16_is_sound", lambda device: sound)
    found = pick_precision(CUDA)
    assert found.name == name and found.device_type == "cuda"


def test_precisions_by_name():
    assert pick_precision(CPU, "bf16") == Precision("bf16", "cpu")
    assert pick_precision(torch.device("mps")).name == "fp32"
    with pytest.raises(DeviceError, match="fp16 training needs CUDA"):
        pick_precision(CPU, "fp16")
    with pytest.raises(DeviceError, match="unknown precision 'int8'; there are auto"):
        pick_precision(CPU, "int8")


def test_autocast_and_scaler_follow_the_precision():
    x = torch.ones(2, 2)
    with Precision("bf16").autocast():
        assert (x @ x).dtype == torch.bfloat16
    with Precision("fp32").autocast():
        assert (x @ x).dtype == torch.float32
    assert not Precision("bf16").scaler().is_enabled()
    assert Precision("fp16").scaler().is_enabled()


def test_peaks_are_of_the_card_that_is_meant(monkeypatch):
    for name, peak in (("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, n=name: n)
        assert peak_flops(CUDA, "bf16") == peak
    assert peak_flops(CUDA, "fp32") == 67e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card L40")
    assert peak_flops(CUDA, "bf16") is None and peak_flops(CPU, "fp32") is None


def test_the_machine_and_the_code_have_names():
    machine = describe_machine(CPU)
    model = cpu_information().get("model name")
    assert machine["device_name"] == model or model is None
    assert machine["device_name"] and machine["torch"] == torch.__version__
    code = describe_code()
    assert len(code["files"]) == 16 and code == describe_code()
    assert code["commit"] is None or len(code["commit"]) == 40
    assert 0 < peak_memory(CPU) < (total_memory(CPU) or 2**50)


def test_running_out_of_memory_is_told_from_other_errors():
    for error in (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"),
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
    ):
        assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


def test_a_precision_cannot_be_changed_on_the_way():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Precision().name = "bf16"
