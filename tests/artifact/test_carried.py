"""Exported files say where they come from, and hostile ones end in our errors."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
from artifacts import recipe
from nets import NETS
from places import ROOT
from runs import silent

import qrecipe
from qrecipe.artifact.carried import BEGINNING, ENTRY, KEY, add_to_archive, carried
from qrecipe.artifact.saving import text_of
from qrecipe.errors.findings import ArtifactError


@pytest.fixture(scope="module")
def origin():
    net = NETS["mlp"]
    return qrecipe.provenance(
        qrecipe.quantize(net.model(), recipe(), net.batches(), progress=silent)
    )


@pytest.fixture(scope="module")
def text(origin):
    return text_of(origin)


def varint(number):
    low, more = number & 127, number >> 7
    return bytes([low | 128]) + varint(more) if more else bytes([low])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def onnx_file(text):
    """A version, a producer and a graph of some bytes before the metadata."""
    entry = field(1, KEY.encode()) + field(2, text.encode())
    other = field(1, b"other") + field(2, b"else")
    start = b"\x08\x0a" + field(2, b"pytorch") + field(7, bytes(300))
    return start + field(14, other) + field(14, entry)


def openvino_file(text):
    from xml.sax.saxutils import quoteattr

    note = f"<rt_info><{KEY} value={quoteattr(text)}/></rt_info>"
    return f'<?xml version="1.0"?>\n<net>{note}</net>'.encode()


def archive(text):
    stream = io.BytesIO()
    with ZipFile(stream, "w", ZIP_DEFLATED) as made:
        made.writestr("model/data.json", "{}")
        made.writestr(f"model/{ENTRY}", text)
    return stream.getvalue()


def program(text):
    content = text.encode()
    return b"\x3c\0\0\0ET12" + bytes(64) + len(content).to_bytes(4, "little") + content + bytes(32)


KINDS = {
    "ONNX": onnx_file,
    "OpenVINO": openvino_file,
    "torch's archive": archive,
    "ExecuTorch": program,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def refused(path, content, code="QR505"):
    path.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        carried(path)
    (finding,) = caught.value.findings
    assert finding.code == code
    return str(caught.value)


@every_kind
def test_recipe_plan_and_versions_are_read_back(kind, text, origin, tmp_path):
    file = tmp_path / "model"
    file.write_bytes(KINDS[kind](text))
    found = carried(file)
    assert (found.kind, found.nbytes) == (kind, file.stat().st_size)
    assert (found.origin.recipe, found.origin.fingerprint) == (origin.recipe, origin.fingerprint)
    assert found.origin.versions == origin.versions
    assert found.checked.plan.to_json() == origin.plan


@every_kind
def test_a_file_of_somebody_else_says_nothing(kind, text, tmp_path):
    content = KINDS[kind](text.replace("qrecipe", "someone"))
    for part in (KEY.encode(), BEGINNING.encode()):
        content = content.replace(part, b"x" * len(part))
    if kind == "torch's archive":
        content = archive("").replace(b"qrecipe.json", b"someone.json")
    assert "says nothing about a recipe" in refused(tmp_path / "model", content)


@every_kind
def test_a_file_that_is_cut_is_refused(kind, text, tmp_path):
    content = KINDS[kind](text)
    for size in range(9, len(content) - 40, max(len(content) // 60, 1)):
        refused(tmp_path / "model", content[:size])


@every_kind
def test_a_text_that_is_no_origin_is_refused(kind, text, tmp_path):
    file = tmp_path / "model"
    assert "bad metadata" in refused(file, KINDS[kind](BEGINNING + '1", "recipe": 1}'))
    assert "bad metadata" in refused(file, KINDS[kind](BEGINNING + '1"' + "[" * 50_000))
    forged = json.loads(text)
    forged["fingerprint"] = "0" * 64
    assert "another recipe" in refused(file, KINDS[kind](json.dumps(forged)))
    newer = text.replace(BEGINNING + "1", BEGINNING + "99")
    assert "has format 99" in refused(file, KINDS[kind](newer), "QR506")


@every_kind
def test_a_text_that_is_too_long_is_not_read(kind, tmp_path):
    content = KINDS[kind](BEGINNING + '1"' + " " * 2**23)
    assert "more than 8,388,608" in refused(tmp_path / "model", content)


def test_numbers_that_do_not_end_and_many_fields_are_refused(tmp_path):
    file = tmp_path / "model.onnx"
    assert "64 bits" in refused(file, b"\x08\x0a" + b"\xff" * 100)
    assert "longer than the file" in refused(file, b"\x08\x0a" + varint(7 << 3 | 2) + varint(2**60))
    assert "more than 10,000 fields" in refused(file, b"\x08\x0a" * 20_000)


def test_entities_are_not_expanded(tmp_path):
    bomb = b'<?xml version="1.0"?><!DOCTYPE net [<!ENTITY a "aaaa">]><net>&a;</net>'
    assert "document type" in refused(tmp_path / "model.xml", bomb)


def test_a_long_table_of_contents_is_not_read(text, tmp_path):
    content = bytearray(archive(text))
    at = content.rfind(b"PK\5\6")
    content[at + 12 : at + 16] = (2**31).to_bytes(4, "little")
    assert "table of contents" in refused(tmp_path / "model.pt2", bytes(content))


def test_the_text_is_added_below_the_root_of_an_archive(text, tmp_path):
    file = tmp_path / "model.pt2"
    with ZipFile(file, "w") as made:
        made.writestr("net/data.json", "{}")
    add_to_archive(file, text)
    assert ZipFile(file).namelist() == ["net/data.json", f"net/{ENTRY}"]
    assert carried(file).kind == "torch's archive"


def test_a_stored_model_is_no_exported_one(good):
    assert carried(good) is None


def test_exported_files_are_read_without_torch():
    code = """
import sys
import qrecipe.artifact.carried
assert not {"torch", "numpy", "onnx", "openvino"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("net.onnx", "ONNX"),
        ("net.xml", "OpenVINO"),
        ("net.pte", "ExecuTorch"),
        ("net.pt2", "torch's archive"),
    ],
)
@pytest.mark.parametrize("content", [b"", b"not what the name says"])
def test_a_file_that_is_not_what_its_name_says_is_called_that(name, kind, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        ArtifactError, match=f"QR505 .*{name}.* is damaged, or is not a file of {kind}"
    ):
        carried(tmp_path / name)


def test_the_weights_of_openvino_point_to_the_graph_beside_them(tmp_path):
    (tmp_path / "net.bin").write_bytes(bytes(100))
    assert carried(tmp_path / "net.bin") is None
    (tmp_path / "net.xml").write_text("<net/>")
    with pytest.raises(ArtifactError, match=r"QR505 (?s:.)*inspect \"net\.xml\" beside"):
        carried(tmp_path / "net.bin")


def test_a_stored_model_may_have_any_name(tmp_path):
    net = NETS["mlp"]
    made = qrecipe.quantize(net.model(), recipe(), net.batches(), progress=silent)
    qrecipe.save_quantized(made, tmp_path / "net.pt2")
    assert carried(tmp_path / "net.pt2") is None
