"""The training text: what every machine with Python already has, cut into documents.

Four kinds of document, each closed by the end token when it is encoded:

``code``     a top-level definition (or a module's head) of a standard library module;
``chat``     a question about a module, a function or a language topic, with the docstring,
             the first line of it, the source or the topic's opening as the answer;
``topic``    a section of the language reference in ``pydoc_data.topics``;
``licence``  a licence text of Python or of the packages that this training itself needs.

Documents are short and of every length on purpose: a model trained on them ends its
answers by itself, early or late by the kind of prompt, which gives a scheduler work to do.
The split is by file (or topic, or licence text), so no held-out document has a sibling from
the same file in the training part.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics as LANGUAGE_TOPICS

KINDS = ("code", "chat", "topic", "licence")
HELD_OUT_PER_MILLE = {"code": 30, "topic": 80, "licence": 120}
# Times each kind is repeated in the training part: code is 20 times larger than the prose.
REPEATS = {"code": 1, "chat": 1, "topic": 3, "licence": 2}

# Tests and machine-made tables teach a small model nothing but noise; _sysconfigdata also
# holds the paths of the machine that built the interpreter.
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
    "lib2to3",
    "pydoc_data",
    "config",
    "msilib",
    "turtledemo",
}
SKIPPED_FILE = re.compile(r"^(_sysconfigdata|__phello__|entities\.py|_pydecimal_tables)")
LICENCE_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pip",
    "setuptools",
    "packaging",
    "filelock",
    "regex",
    "tqdm",
    "PyYAML",
    "typing_extensions",
    "Jinja2",
    "MarkupSafe",
    "networkx",
    "sympy",
    "mpmath",
    "fsspec",
)
LONGEST_DOCUMENT_CHARS = 24_000
LONGEST_ANSWER_CHARS = 1_600

USER, ASSISTANT, SYSTEM, END, PAD = "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|pad|>"
SYSTEM_TEXTS = ("You are a helpful assistant.", "You answer questions about Python.")


@dataclass(frozen=True)
class Document:
    """One text of the corpus; ``source`` names the file it came from, relative to its root."""

    kind: str
    source: str
    text: str
    held_out: bool


def stable_number(text: str, modulus: int) -> int:
    """A number in 0..modulus-1 that is the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % modulus


def is_held_out(kind: str, source: str) -> bool:
    return stable_number(f"split/{kind}/{source}", 1000) < HELD_OUT_PER_MILLE[kind]


def chat_text(question: str, answer: str, system: str | None = None) -> str:
    """The same layout as the chat template in ``tiny_tokens.py``, without the closing end token."""
    head = f"{SYSTEM}\n{system}\n" if system else ""
    return f"{head}{USER}\n{question}\n{ASSISTANT}\n{answer}"


def pick(key: str, choices: tuple[str, ...]) -> str:
    return choices[stable_number(key, len(choices))]


def with_system(key: str) -> str | None:
    """One chat in eight opens with a system message."""
    return SYSTEM_TEXTS[stable_number(key + "/which", 2)] if stable_number(key, 8) == 0 else None


def standard_library_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        skipped = SKIPPED_FILE.match(relative.name) or relative.parts[0].startswith("config-")
        if not skipped and SKIPPED_FOLDERS.isdisjoint(relative.parts[:-1]):
            found.append((relative.as_posix(), path))
    return sorted(found)


def pieces_of_module(source: str, tree: ast.Module) -> Iterator[str]:
    """Each top-level definition with the comments above it; what lies between is joined up."""
    lines = source.splitlines(keepends=True)
    start = 0
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        while first > start and lines[first - 1].startswith("#"):
            first -= 1
        yield "".join(lines[start:first])
        assert node.end_lineno is not None
        yield "".join(lines[first : node.end_lineno])
        start = node.end_lineno
    yield "".join(lines[start:])


def named_definitions(tree: ast.Module, module: str) -> Iterator[tuple[str, str, ast.AST, str]]:
    """(kind, dotted name, node, docstring) of the module and of everything with a docstring in it."""
    doc = ast.get_docstring(tree)
    if doc:
        yield "module", module, tree, doc
    stack: list[tuple[str, ast.AST]] = [(module, tree)]
    while stack:
        prefix, parent = stack.pop()
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}.{node.name}"
                if isinstance(node, ast.ClassDef):
                    stack.append((name, node))
                kind = "class" if isinstance(node, ast.ClassDef) else "function"
                if doc := ast.get_docstring(node):
                    yield kind, name, node, doc


def chats_of_module(source: str, tree: ast.Module, module: str) -> Iterator[str]:
    """Questions whose answers have lengths of their own: a line, a docstring, a whole function."""
    for kind, name, node, doc in named_definitions(tree, module):
        short = name.split(".", 1)[1] if stable_number(name + "/short", 3) == 0 and "." in name else name
        if len(doc) <= LONGEST_ANSWER_CHARS:
            question = pick(
                name + "/q",
                (
                    f"What does {short} do?",
                    f"Explain {short}.",
                    f"Describe the {kind} {short}.",
                    f"What is {short}?",
                    f"How do I use {short}?",
                    f"Tell me about {short}.",
                ),
            )
            yield chat_text(question, doc, with_system(name))
        first_line = doc.strip().split("\n\n")[0].replace("\n", " ")
        if stable_number(name + "/brief", 3) == 0 and 15 < len(first_line) < 200:
            question = pick(
                name + "/b",
                (
                    f"In one line, what is {short}?",
                    f"Summarize {short} in one sentence.",
                    f"Briefly, what does {short} do?",
                ),
            )
            yield chat_text(question, first_line, with_system(name + "/brief"))
        if kind == "function" and stable_number(name + "/code", 4) == 0:
            code = textwrap.dedent(ast.get_source_segment(source, node, padded=True) or "")
            if 40 < len(code) <= LONGEST_ANSWER_CHARS:
                last = name.rsplit(".", 1)[1]
                question = pick(
                    name + "/c",
                    (
                        f"Show me the code of {short}.",
                        f"Write a Python function called {last}.",
                        f"How is {short} implemented?",
                    ),
                )
                yield chat_text(question, code, with_system(name + "/code"))


def module_documents() -> Iterator[Document]:
    for name, path in standard_library_files():
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue
        held_out = is_held_out("code", name)
        for piece in pieces_of_module(source, tree):
            text = piece.strip("\n")
            if 30 <= len(text) <= LONGEST_DOCUMENT_CHARS:
                yield Document("code", name, text, held_out)
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for chat in chats_of_module(source, tree, module):
            yield Document("chat", name, chat, held_out)


SECTION = re.compile(r"\n(?=[^\n]+\n(?:\*{4,}|={4,}|-{4,})\n)")


def topic_documents() -> Iterator[Document]:
    for name in sorted(LANGUAGE_TOPICS):
        held_out = is_held_out("topic", name)
        sections = [s.strip("\n") for s in SECTION.split("\n" + LANGUAGE_TOPICS[name])]
        for section in sections:
            if len(section) < 30:
                continue
            yield Document("topic", name, section[:LONGEST_DOCUMENT_CHARS], held_out)
            title, _, body = section.partition("\n")
            paragraphs = [p for p in body.split("\n\n") if p.strip(" \n*=-")]
            for count in (1, 3):
                answer = "\n\n".join(paragraphs[:count]).strip("*=-\n")
                key = f"{name}/{title}/{count}"
                if 40 < len(answer) <= LONGEST_ANSWER_CHARS:
                    question = pick(
                        key,
                        (
                            f"Tell me about this topic of Python: {title}.",
                            f"What is meant by {title}?",
                            f"Explain {title} in Python.",
                        ),
                    )
                    yield Document("chat", name, chat_text(question, answer, with_system(key)), held_out)


def licence_documents() -> Iterator[Document]:
    """Licences of Python and of the installed packages that training needs, near-copies once."""
    texts: list[tuple[str, str]] = []
    own = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    if own.exists():
        texts.append(("python", own.read_text(encoding="utf-8", errors="replace")))
    for package in LICENCE_PACKAGES:
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if re.match(r"(licen[sc]e|copying)", file.name, re.IGNORECASE) and not file.name.endswith(".py"):
                path = Path(str(file.locate()))
                if path.is_file():
                    texts.append((f"{package}/{file}", path.read_text(encoding="utf-8", errors="replace")))
    seen: set[str] = set()
    for name, text in texts:
        # The holder's line differs between copies of one licence; the rest decides.
        lines = [line.strip() for line in text.splitlines() if "copyright (c)" not in line.lower()]
        body = re.sub(r"\W+", " ", " ".join(lines)).strip().lower()
        key = body[len(body) // 4 : len(body) // 2]
        if len(body) < 200 or key in seen:
            continue
        seen.add(key)
        held_out = is_held_out("licence", hashlib.sha256(key.encode()).hexdigest())
        yield Document("licence", name, text.strip("\n")[:LONGEST_DOCUMENT_CHARS], held_out)


def load_documents() -> list[Document]:
    """Every document, in a fixed order; every kind is checked to be in both parts."""
    documents = [*module_documents(), *topic_documents(), *licence_documents()]
    for kind in KINDS:
        for part in (False, True):
            if not any(d.kind == kind and d.held_out is part for d in documents):
                raise RuntimeError(f"no {kind} documents with held_out={part}: the split needs another hash")
    return documents
