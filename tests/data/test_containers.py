"""Rows and texts in compressed files, archives, office documents and folders are as in plain files, or are refused."""

import bz2
import gzip
import io
import json
import lzma
import random
import stat
import tarfile
import tempfile
import zipfile

import pyarrow
import pytest

from data.documents import texts
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data import containers
from rwkv_peft.data.binidx import BinidxDataset
from rwkv_peft.data.preprocess import main

ROWS = [{"query": word, "response": word.upper()} for word in ("a", "b")]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
DUE = [("User: a\n\nAssistant: A", " A"), ("User: b\n\nAssistant: B", " B")]
CSV = b"query,response\na,A\nb,B\n"
PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
}


def zipped(files):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in files.items():
            # of 1980, because the time is part of a test's name
            info = name if isinstance(name, zipfile.ZipInfo) else zipfile.ZipInfo(name)
            archive.writestr(info, part, zipfile.ZIP_DEFLATED)
    return content.getvalue()


def tape(files, **header):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, part in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(part)
            for field, value in header.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(part))
    return content.getvalue()


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize(
    "name, content, due",
    [
        ("in.jsonl", LINES, DUE),
        ("in.csv", CSV, DUE),
        ("in.json", json.dumps(ROWS).encode(), DUE),
        ("in.txt", b"A text.\n", [("A text.\n", "A text.\n")]),
        ("in.tar", tape({"x/in.jsonl": LINES}), DUE),
    ],
)
def test_a_compressed_file_is_the_file(preprocess, packing, name, content, due):
    assert texts(preprocess(PACKERS[packing](content), "--no-append_eod", name=name + packing)) == due


def test_an_archive_is_a_folder_whose_rows_are_named_by_it(preprocess, capsys):
    files = {
        "set/train.jsonl": LINES,
        "set/test.jsonl": b"x",
        "__MACOSX/._x": b"x",
        "set/.hidden": b"x",
        "README.md": b"x",
    }
    assert texts(preprocess(zipped(files), "--no-append_eod", name="in.zip")) == DUE
    said = capsys.readouterr().out
    assert "in.zip: the split train is read; test may validate" in said and "in.zip: left out README.md" in said
    with pytest.raises(UserError, match=r"in\.zip/in\.jsonl, line 3: not JSON") as refused:
        preprocess(zipped({"in.jsonl": LINES + b"x\n"}), name="in.zip")
    assert f"{tempfile.gettempdir()}/tmp" not in str(refused.value)


def link(name="in.jsonl", target="/etc/passwd"):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return zipped({info: target})


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("in.zip", zipped({"../out.jsonl": LINES}), "leads out of it"),
        ("in.zip", zipped({"/out.jsonl": LINES}), "leads out of it"),
        ("in.zip", zipped({"x/..\\..\\out.jsonl": LINES}), "leads out of it"),
        ("in.zip", zipped({"C:/out.jsonl": LINES}), "leads out of it"),
        ("in.zip", link(), "a link or a device"),
        ("in.tar", tape({"../out.jsonl": LINES}), "leads out of it"),
        ("in.tar", tape({"in.jsonl": b""}, type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a link or a device"),
        ("in.tar", tape({"in.jsonl": b""}, type=tarfile.LNKTYPE, linkname="/etc/passwd"), "a link or a device"),
        ("in.tar", tape({"in.jsonl": b""}, type=tarfile.FIFOTYPE), "a link or a device"),
        ("in.zip", zipped({"in.txt": bytes(1 << 16)}), "unpacks to more than"),
        ("in.tar.xz", lzma.compress(tape({"in.txt": bytes(1 << 16)})), "unpacks to more than"),
        ("in.txt.bz2", bz2.compress(bytes(1 << 16)), "unpacks to more than"),
        ("in.jsonl.zst", PACKERS[".zst"](b"\n" * (1 << 16)), "unpacks to more than"),
        ("in.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], "cannot be read to its end"),
        ("in.zip", zipped({"in.jsonl": LINES})[:-9], "cannot be unpacked"),
        ("in.zip", zipped({"in.jsonl.zip": zipped({"in.jsonl": LINES})}), "no file in it can be read"),
        ("in.docx", b"PK\3\4 no document", "cannot be read by pandoc"),
        ("in.xlsx", b"PK\3\4 no workbook", "cannot be read by python-calamine"),
        ("in.txt", b"%PDF-1.7", r"a PDF; `pdftotext -enc UTF-8 .*in\.txt .*in\.txt`"),
        ("in.pdf", b"%PDF-1.7", r"a PDF; `pdftotext -enc UTF-8 .*in\.pdf .*in\.txt`"),
        ("in.csv", zipped({"a": b"b"}), "a zip file, as office programs write them"),
    ],
)
def test_a_hostile_or_damaged_container_is_one_message_and_writes_nothing(
    preprocess, tmp_path, monkeypatch, name, content, message
):
    monkeypatch.setattr(containers, "FLOOR", 1 << 12)
    monkeypatch.setattr(containers, "RATIO", 10)
    before = {*tmp_path.parent.iterdir()}
    with pytest.raises(UserError, match=message):
        preprocess(content, name=name)
    assert {*tmp_path.parent.iterdir()} == before and not list(tmp_path.rglob("*.bin"))


def test_mutants_of_archives_are_read_or_give_a_message(preprocess):
    draw = random.Random(0)
    wholes = {".zip": zipped({"a.jsonl": LINES, "b.jsonl": LINES}), ".tar": tape({"a.jsonl": LINES})}
    wholes |= {".tar.gz": gzip.compress(wholes[".tar"]), ".jsonl.zst": PACKERS[".zst"](LINES)}
    for ending, whole in wholes.items():
        for _ in range(60):
            mutant = bytearray(whole)
            for _ in range(draw.choice((1, 1, 4))):
                mutant[draw.randrange(len(mutant))] = draw.randrange(256)
            try:
                preprocess(bytes(mutant[: draw.choice((len(mutant), draw.randrange(len(mutant))))]), name=f"in{ending}")
            except UserError as error:
                assert "in" in str(error)


SHEET = {
    "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"><Override '
    'PartName="/xl/workbook.xml" ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.sheet.main'
    '+xml"/></Types>',
    "_rels/.rels": '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship '
    'Id="r1" Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument" '
    'Target="xl/workbook.xml"/></Relationships>',
    "xl/workbook.xml": '<workbook xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main" xmlns:r="http://'
    'schemas.openxmlformats.org/officeDocument/2006/relationships"><sheets><sheet name="One" sheetId="1" r:id="r1"/>'
    '<sheet name="Two" sheetId="2" r:id="r2"/></sheets></workbook>',
    "xl/_rels/workbook.xml.rels": '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
    + "".join(
        f'<Relationship Id="r{n}" Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/worksheet" '
        f'Target="worksheets/sheet{n}.xml"/>'
        for n in (1, 2)
    )
    + "</Relationships>",
}


def workbook(cells):
    """The bytes of an .xlsx whose first sheet has {place: text or number}, a row for each cell's number."""
    rows = {}
    for place, value in cells.items():
        kind = f't="inlineStr"><is><t>{value}</t></is>' if isinstance(value, str) else f"><v>{value}</v>"
        rows.setdefault("".join(filter(str.isdigit, place)), []).append(f'<c r="{place}" {kind}</c>')
    data = "".join(f'<row r="{number}">{"".join(row)}</row>' for number, row in rows.items())
    page = '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>{}</sheetData></worksheet>'
    return zipped(SHEET | {"xl/worksheets/sheet1.xml": page.format(data), "xl/worksheets/sheet2.xml": page.format("")})


def test_a_workbooks_first_sheet_is_a_table(preprocess, capsys):
    cells = {"A1": "query", "B1": "response", "A2": "a", "B2": 4, "A3": "b", "B3": 0.5}
    data = preprocess(workbook(cells), "--no-append_eod", name="in.xlsx")
    assert [answer for _, answer in texts(data)] == [" 4", " 0.5"]
    assert "in.xlsx: the sheet One is read; left out Two" in capsys.readouterr().out


def test_a_sheet_of_more_cells_than_memory_is_a_message(preprocess):
    with pytest.raises(UserError, match=r"in\.xlsx cannot be read by python-calamine"):
        preprocess(workbook({"A1": "query", "XFD1048576": "x"}), name="in.xlsx")


WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
WORDS = f'<w:document xmlns:w="{WORD}"><w:body><w:p><w:r><w:t>One word.'
DOCX = {
    "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"><Override '
    'PartName="/word/document.xml" ContentType="application/vnd.openxmlformats-officedocument.wordprocessingml.document'
    '.main+xml"/></Types>',
    "_rels/.rels": SHEET["_rels/.rels"].replace("xl/workbook.xml", "word/document.xml"),
    "word/document.xml": WORDS + "</w:t></w:r></w:p></w:body></w:document>",
}


OPEN = "urn:oasis:names:tc:opendocument:xmlns"


def open_document(kind, body):
    """The bytes of an OpenDocument file of a kind with this body."""
    spaces = " ".join(f'xmlns:{name}="{OPEN}:{name}:1.0"' for name in ("office", "table", "text"))
    root = "<office:document-{kind} {spaces}>{body}</office:document-{kind}>"
    parts = "".join(f"<office:{part}/>" for part in ("font-face-decls", "styles", "automatic-styles", "master-styles"))
    content = root.format(kind="content", spaces=spaces, body=f"{parts}<office:body>{body}</office:body>")
    manifest = f'<manifest:manifest xmlns:manifest="{OPEN}:manifest:1.0"/>'
    styles = root.format(kind="styles", spaces=spaces, body=parts)
    mimetype = f"application/vnd.oasis.opendocument.{kind}"
    return zipped(
        {"mimetype": mimetype, "META-INF/manifest.xml": manifest, "styles.xml": styles, "content.xml": content}
    )


EPUB = {
    "META-INF/container.xml": '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles><rootfile '
    'full-path="a.opf"/></rootfiles></container>',
    "a.opf": '<package xmlns="http://www.idpf.org/2007/opf"><metadata/><manifest><item id="a" href="a.xhtml" '
    'media-type="application/xhtml+xml"/></manifest><spine><itemref idref="a"/></spine></package>',
    "a.xhtml": '<html xmlns="http://www.w3.org/1999/xhtml"><body><p>One word.</p></body></html>',
}


def test_a_sheet_of_open_document_is_rows(preprocess):
    def cell(words):
        return f'<table:table-cell office:value-type="string"><text:p>{words}</text:p></table:table-cell>'

    lines = [("query", "response"), *((row["query"], row["response"]) for row in ROWS)]
    rows = "".join(f"<table:table-row>{''.join(map(cell, line))}</table:table-row>" for line in lines)
    body = f'<office:spreadsheet><table:table table:name="One">{rows}</table:table></office:spreadsheet>'
    assert texts(preprocess(open_document("spreadsheet", body), "--no-append_eod", name="in.ods")) == DUE


@pytest.mark.parametrize(
    "name, content",
    [
        ("in.docx", zipped(DOCX)),
        ("in.odt", open_document("text", "<office:text><text:p>One word.</text:p></office:text>")),
        ("in.epub", zipped(EPUB)),
        (
            "in.html",
            b"<html><head><title>x</title><script>bad()</script></head><body><p>One <b>word</b>.</p></body></html>",
        ),
        ("in.rtf", rb"{\rtf1 One word.}"),
        ("in.md", b"One word.\n"),
    ],
)
def test_a_document_is_its_text(preprocess, name, content):
    assert texts(preprocess(content, "--no-append_eod", name=name)) == [("One word.\n", "One word.\n")]


def test_a_page_shows_no_other_file(preprocess, tmp_path):
    (tmp_path / "key.txt").write_text("secret")
    page = '<p>One</p><iframe src="key.txt"></iframe><object data="file:///etc/passwd"></object><img src="key.txt">'
    ((text, _),) = texts(preprocess(page, "--no-append_eod", name="in.html"))
    assert "secret" not in text and "root" not in text


def made(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def read(tmp_path, *flags):
    command = [str(tmp_path / "in"), "--output", str(tmp_path / "data"), "--tokenizer", "bytes", "--no-append_eod"]
    assert main([*command, *flags]) == 0
    return [text for text, _ in texts(BinidxDataset(tmp_path / "data"))]


def test_a_folder_of_texts_is_read_with_those_below_it_and_says_what_is_left_out(tmp_path, capsys):
    files = {"b.txt": "B", "a.md": "A", "deep/er/c.txt": "C", "README.md": "x", "LICENSE": "x", ".git/x.txt": "x"}
    made(tmp_path / "in", files | {".hidden.txt": "x", "metadata.txt": "x"})
    assert read(tmp_path) == ["A", "B", "C"]
    said = capsys.readouterr().out
    assert f"note: {tmp_path / 'in'}: left out .hidden.txt, LICENSE, README.md, metadata.txt" in said


def test_a_folder_of_json_files_is_a_row_a_file(tmp_path):
    made(tmp_path / "in", {f"x/{n}.json": json.dumps(row) for n, row in enumerate(ROWS)} | {"config.json": "{}"})
    assert read(tmp_path) == [text for text, _ in DUE]


def test_folders_named_as_splits_are_splits(tmp_path, capsys):
    made(tmp_path / "in", {"train/0.jsonl": LINES.decode(), "test/0.jsonl": '{"query": "t", "response": "T"}'})
    assert read(tmp_path) == [text for text, _ in DUE]
    assert "the split train is read; test may validate (--val_data" in capsys.readouterr().out
    assert read(tmp_path, "--split", "test", "--overwrite") == ["User: t\n\nAssistant: T"]


COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "value",
    [
        {"version": "1", "data": ROWS},
        {"train": ROWS, "test": [{"query": "t"}]},
        COLUMNS,
        {name: {str(n): cell for n, cell in enumerate(cells)} for name, cells in COLUMNS.items()},
        {"columns": [*COLUMNS], "index": [*range(len(ROWS))], "data": [[*row.values()] for row in ROWS]},
        {"features": [], "rows": [{"row_idx": n, "row": row, "truncated_cells": []} for n, row in enumerate(ROWS)]},
        ROWS,
    ],
)
def test_a_json_file_may_hold_all_rows_in_a_field_or_as_columns(preprocess, value, indent):
    assert texts(preprocess(json.dumps(value, indent=indent), "--no-append_eod", name="in.json")) == DUE


def test_fields_named_columns_and_data_may_be_columns_themselves(preprocess):
    value = {"columns": ["Q", "R"], "data": ["A", "B"]}
    found = texts(preprocess(json.dumps(value), "--fields", "columns", "data", "--no-append_eod", name="in.json"))
    assert [text for text, _ in found] == ["User: Q\n\nAssistant: A", "User: R\n\nAssistant: B"]


def test_a_row_of_the_viewer_that_is_no_object_gets_a_message(preprocess):
    with pytest.raises(UserError, match="a row is a number, not an object"):
        preprocess(json.dumps({"rows": [{"row_idx": 0, "row": ROWS[0]}, 5]}), name="in.json")


@pytest.mark.parametrize(
    "row", [ROWS[0], {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "A"}]}]
)
def test_a_row_in_a_json_file_of_its_own_is_a_row(preprocess, row):
    assert texts(preprocess(json.dumps(row), "--no-append_eod", name="in.json")) == DUE[:1]
