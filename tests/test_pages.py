"""What method files and pages promise: shared blocks are identical, parts run when pasted, quotes
stand in the code, commands are understood."""
import ast
import copy
import dataclasses
import importlib
import math
import re
import shlex
import textwrap
from collections import OrderedDict
from typing import Literal

import pytest
import torch
from PIL import Image

from common import make_config, make_parser
from conftest import METHODS, ROOT, every_method, normal, small

EQUATIONS = {"mclim": range(1, 11), "mvmae": range(1, 8), "cmae": range(1, 7),
             "camae": range(1, 7)}
PROGRAMS = {"eval_linear": "evaluate", "eval_finetune": "train", "eval_dense": "evaluate",
            "show": "show", "compare": "compare", "speed": "measure"}  # name → its work
USES_COMMON = {"Config", "train", "main", "views", "contrastive_crop", "Boxes"}


def definitions(method):
    """The functions and classes of a method's file: name → syntax tree."""
    tree = ast.parse((ROOT / f"{method}.py").read_text())
    return {node.name: node for node in tree.body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def source(method, name):
    """The text of a function, a class or a method ("Encoder.forward") of a method's file."""
    text = (ROOT / f"{method}.py").read_text()
    node = ast.parse(text)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", "") == part)
    return "".join(text.splitlines(keepends=True)[node.lineno - 1 - len(getattr(
        node, "decorator_list", ())):node.end_lineno])


def names_in(node):
    return {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}


@every_method
def test_model_code_needs_nothing_of_the_project(method):
    imports = [node for node in ast.parse((ROOT / f"{method}.py").read_text()).body
               if isinstance(node, ast.ImportFrom) and (ROOT / f"{node.module}.py").exists()]
    taken = [alias.name for node in imports for alias in node.names]
    assert {node.module for node in imports} == {"common", "augment"} and len(taken) <= 16
    for name, node in definitions(method).items():
        if name not in USES_COMMON:
            assert not names_in(node) & set(taken), name


def test_a_block_that_files_share_is_the_same_to_the_letter():
    own = {"Config", "Encoder", "train", "main", "views"}
    texts = {}
    for method in METHODS:
        for name in definitions(method):
            if name not in own and not name.endswith("_loss"):
                texts.setdefault(name, []).append(source(method, name))
    shared = {name for name, found in texts.items() if len(found) > 1}
    assert {"Attention", "Block", "patchify", "gather", "random_mask", "ema", "Decoder",
            "cosine_lr", "param_groups"} <= shared
    for name in shared:
        assert len(set(texts[name])) == 1, name


PARTS = {
    "mclim": ["dcl_loss", "info_nce_loss", "reconstruction_loss", "random_mask", "Encoder",
              "MCLim"],
    "mvmae": ["nt_xent_loss", "reconstruction_loss", "cosine_lr", "Encoder", "MVMAE"],
    "cmae": ["info_nce_loss", "location_loss", "semantic_boxes", "Encoder", "CMAE"],
    "macrl": ["info_nce_loss", "reconstruction_loss", "Encoder", "MACRL"],
    "camae": ["info_nce_loss", "idm_mask", "plb_update", "reconstruction_loss", "Encoder",
              "CAMAE"],
}


@pytest.mark.parametrize("method, part", [(m, part) for m in METHODS for part in PARTS[m]])
def test_a_part_runs_when_it_is_pasted(method, part):
    """With torch's usual names, and the functions and classes that the part names."""
    known, wanted, taken = definitions(method), [part], {}
    while wanted:
        name = wanted.pop()
        if name in known and name not in taken:
            taken[name] = source(method, name)
            wanted += names_in(known[name])
    assert not {"Config", "train", "main"} & set(taken)
    space = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional, "math": math, "copy": copy,
             "dist": torch.distributed, "OrderedDict": OrderedDict, "Literal": Literal}
    if "SwinEncoder" in taken:
        from torchvision.models.swin_transformer import SwinTransformer
        space["SwinTransformer"] = SwinTransformer
    exec("\n\n".join(taken.values()), space)

    z, other, x = normal(6, 16), normal(6, 16, seed=1), normal(6, 3, 16, 16)
    mask = torch.arange(96).view(6, 16) % 3 > 0
    pred, target = normal(6, 16, 5), normal(6, 16, 5, seed=1)
    arguments = {
        "info_nce_loss": (z, other, z, 0.2) if method == "macrl" else (z, other, 0.2),
        "dcl_loss": (z, other, 0.2), "nt_xent_loss": (z, other, 0.2),
        "reconstruction_loss": (pred, target, mask),
        "random_mask": (6, 16, 0.5), "idm_mask": (z, 0.75), "cosine_lr": (5, 20, 3, 1.0),
        "plb_update": (z[0].softmax(0), z[1], 0.9, 0.2), "Encoder": (16, 4, 48, 2, 3),
        "location_loss": (normal(6, 4, 16), mask[:, :4].long()),
        "semantic_boxes": (z.view(6, 4, 4), 0.1),
    }.get(part, (small(method),))
    results = []
    for where in (space, vars(importlib.import_module(method))):
        torch.manual_seed(0)
        result = where[part](*arguments)
        if part == "Encoder":
            result = result.features(x)
        elif isinstance(result, torch.nn.Module):
            result = result(x, x.flip(3))["loss"]
        results.append(torch.as_tensor(result))
    assert torch.equal(*results)


@pytest.mark.parametrize("method", EQUATIONS)
def test_every_equation_stands_on_a_line_of_code_and_in_the_walk(method):
    code = (ROOT / f"{method}.py").read_text().split('"""', 2)[2]
    marked, walked = numbers(code), numbers(" ".join(row[0] for row in walk(method)))
    assert marked >= set(EQUATIONS[method]) and walked >= set(EQUATIONS[method])


def numbers(text):
    """All n of "Eq. n", "Eq. n, m" and "Eq. n to m"."""
    found = set()
    for part in re.findall(r"Eqs?\. (\d+(?:(?:, | to |–| and )\d+)*)", text):
        ends = [int(n) for n in re.findall(r"\d+", part)]
        whole = range(ends[0], ends[-1] + 1) if "to" in part or "–" in part else ends
        found |= set(whole)
    return found


def walk(method):
    """The rows of the page's table "The walk" that quote code: paper, formula, code, where."""
    page = (ROOT / "papers" / f"{method}.md").read_text()
    part = page[page.index("## The walk"):].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")]
             for line in part.splitlines() if "|" in line]
    return [row for row in cells if len(row) == 4 and "`" in row[2]]


@every_method
def test_the_page_quotes_the_file(method):
    rows = walk(method)
    assert len(rows) > 8
    for _, _, code, where in rows:
        text = " ".join(source(method, where.strip("`")).split())
        for quote in re.findall(r"`([^`]+)`", code):
            count = text.count(" ".join(quote.split()))
            assert count == 1, f"{where} holds {quote!r} {count} times"


@every_method
def test_formulas_of_the_page_are_whole(method):
    page = (ROOT / "papers" / f"{method}.md").read_text()
    assert len(page.splitlines()) <= 260
    for formula in re.findall(r"\$([^$]+)\$", page):
        assert formula.count("{") == formula.count("}"), formula
        assert "|" not in formula and "*" not in formula, formula


def commands():
    """(program, arguments) of each command in README, the pages, RESULTS and the docstrings."""
    texts = [path.read_text() for path in (*ROOT.glob("*.md"), *ROOT.glob("papers/*.md"),
                                            *ROOT.glob("results/long/*.md"))]
    texts += [importlib.import_module(name).__doc__ for name in (*METHODS, *PROGRAMS)]
    found = re.findall(r"(?:python|torchrun [^\n`|]*?) (\w+)\.py ([^\n`|#]*)",
                       "\n".join(texts).replace("\\\n", " "))
    return sorted({(name, re.split(r"&&|   ", arguments)[0].strip()) for name, arguments in found})


@pytest.mark.parametrize("name, arguments", commands())
def test_commands_of_the_documents_are_understood(name, arguments, monkeypatch):
    assert (ROOT / f"{name}.py").exists() or name == "mine"
    if name in PROGRAMS:
        module = importlib.import_module(name)
        monkeypatch.setattr(module, PROGRAMS[name], lambda *_: None)
        module.main(shlex.split(arguments))
    if name in METHODS and "--resume" not in arguments and "--help" not in arguments:
        module = importlib.import_module(name)
        parser = make_parser(module.__file__, module.__doc__, module.Config, module.TINY)
        typed = vars(parser.parse_args(shlex.split(arguments)))
        assert make_config(typed, module.Config, module.TINY, name)


@pytest.mark.parametrize("page", ["README", *(f"papers/{method}" for method in METHODS)])
def test_the_page_names_flags_that_exist(page):
    text = (ROOT / f"{page}.md").read_text()
    known = {field.name for other in METHODS
             for field in dataclasses.fields(importlib.import_module(other).Config)}
    sources = "".join((ROOT / f"{name}.py").read_text() for name in PROGRAMS)
    known |= {flag.replace("-", "_") for flag in re.findall(r'"--([a-z-]+)"', sources)}
    known |= set(re.findall(r"^    (\w+): ", sources, re.MULTILINE)) | {"nproc_per_node", "help"}
    for flag in re.findall(r"--(?:no-)?([a-z][a-z0-9-]*)", text):
        assert flag.replace("-", "_") in known, f"--{flag}"


def test_links_lead_to_files_and_headings():
    for page in (*ROOT.glob("*.md"), *ROOT.glob("papers/*.md"), *ROOT.glob("results/**/*.md")):
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if not link.startswith("http"):
                name, _, anchor = link.partition("#")
                file = page.parent / name if name else page
                assert file.exists(), f"{page}: {link}"
                headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M) if anchor else [""]
                slugs = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
                assert anchor in slugs, f"{page}: {link}"


def test_the_code_of_the_readme_runs(untrained):
    text = (ROOT / "README.md").read_text()
    first, second = map(textwrap.dedent, re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    space = {"dataset": [(Image.new("L", (30, 20)), 0)] * 3}
    first = first.replace("runs/mclim-DATE-TIME", str(untrained("mclim")))
    exec(first.replace("PATH", "shapes"), space)
    assert space["features"].shape == (8, 48)
    exec(second, space)
    assert len(space["train_set"]) == 3 and space["test_set"] is None
