"""What goes wrong on this machine rather than on the way to the Hub."""

from __future__ import annotations

import errno
import os

import pytest

from tests.adapter import made


@pytest.mark.parametrize("token", ["hf_qx\nb", "hf_qx☃", "", "hf_qx b", "hf_qx\x7f"])
def test_a_token_that_no_header_can_hold_is_refused_and_never_shown(served, environment, lmoe, token):
    served.add("acme/lora", made.adapter())
    for words in (("pull", "acme/lora", "--token", token), ("inspect", "adapter", "acme/lora", "--token", token)):
        told = lmoe(*words)
        assert (told.code, "error[usage]: the token" in told.err) == (2, True)
        assert "hf_qx" not in told.out + told.err
    assert served.asked("GET", "acme") == []


def test_a_stored_token_that_no_header_can_hold_is_refused_too(served, environment, lmoe):
    served.add("acme/lora", made.adapter())
    environment.set(HF_TOKEN="hf_sécret")
    told = lmoe("pull", "acme/lora")
    assert (told.code, "cret" in told.err) == (2, False)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("by_transport", [False, True])
def test_a_full_disk_is_no_fault_of_the_network(served, environment, lmoe, monkeypatch, number, by_transport):
    served.add("acme/lora", made.adapter())

    def fail(*_, **__):
        if by_transport:
            raise RuntimeError(f"I/O error: no more of it (os error {number})")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    told = lmoe("pull", "acme/lora", "--json")
    assert (told.code, told.codes) == (6, ["disk-full"])
    assert told.document["findings"][0]["where"] == str(environment.cache)


def test_a_cache_that_can_be_no_folder_is_named(served, environment, lmoe):
    served.add("acme/lora", made.adapter())
    environment.set(HF_HOME="/dev/null")
    told = lmoe("pull", "acme/lora", "--json")
    assert (told.code, told.codes) == (2, ["bad-path"])
    assert "/dev/null" in told.document["findings"][0]["message"]
