"""Flags that nothing would look at are refused: a forgotten second flag must not give a plausible answer."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from wdmoe.cli.main import cli

PLACE = ["place", "x.npz", "--device", "a=1GiB,1ms", "--expert-size", "1MB"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["bs", "default", "--policy", "cosine", "--budget", "0s"], "--budget does nothing here"),
        (["bs", "default", "--policy", "bottleneck", "--max-dropped", "0%"], "--max-dropped does nothing here"),
        (["bs", "default", "--policy", "cosine", "--budget", "1s"], "--budget is for --policy budget"),
        (["bs", "default", "--rank", "energy"], "--rank and --whole-layers are for"),
        (["bs", "default", "--http", "off", "--api-key", "k"], "--api-key does nothing here: it is for"),
        (["bs", "default", "--engine", "transformers", "--prefix-cache", "0"], "--prefix-cache does nothing here"),
        (["bs", "default", "--record-trace", "t.npz", "--kv-memory", "1GB"], "--kv-memory does nothing here"),
        (["demo", "--policy", "topk", "--budget-per-token", "0s"], "--budget-per-token does nothing here"),
        (["demo", "--links", "0", "--seed", "3"], "--seed does nothing here: it is for links that are dealt out"),
        (
            ["place", "x.npz", "--device", "a=1GiB,1ms", "--expert-size", "1MB", "--time-limit", "5s"],
            "it is for --exact",
        ),
        (["simulate", "journal", "--backend", "dask", "--workers", "2"], "--workers does nothing here"),
        (["broadcast", "a.png", "b.png", "--advertise", "here"], "give --bind too"),
    ],
)
def test_an_idle_flag_is_refused_with_its_name(words: list[str], says: str) -> None:
    ran = CliRunner().invoke(cli, words)
    assert ran.exit_code == 2, ran.output
    assert says in ran.output


def test_draws_are_not_for_bundles(tmp_path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "kind": "bundle"}), encoding="utf-8")
    ran = CliRunner().invoke(cli, ["verify", str(tmp_path), "--draws", "3"])
    assert ran.exit_code == 2, ran.output
    assert "--draws does nothing here: it is for results of draws" in ran.output


def test_what_the_environment_or_a_default_says_is_no_flag(monkeypatch) -> None:
    monkeypatch.setenv("WDMOE_API_KEY", "k")
    ran = CliRunner().invoke(cli, ["bs", "/no/such/bundle", "--http", "off"])
    assert "does nothing here" not in ran.output


def test_a_device_that_is_stated_twice_in_a_file(tmp_path) -> None:
    file = tmp_path / "devices.json"
    file.write_text('{"a": {"memory": "1GiB", "token": "1ms"}, "a": {"memory": "2GiB", "token": "1ms"}}')
    words = ["place", "x.npz", "--devices", str(file), "--expert-size", "1MB"]
    ran = CliRunner().invoke(cli, words)
    assert "'a' stands twice" in str(ran.exception), ran.output
