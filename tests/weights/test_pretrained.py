"""Models as folders, and their way to a hub and back; the hub client talks to a stub server on loopback."""

import base64
import hashlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
import yaml

import the_mask
import the_mask.modeling
from the_mask.config import load_config
from the_mask.inference import StreamingSegmentor
from the_mask.inference.load import find_model
from the_mask.modeling.build import build_segmentor
from the_mask.weights.hub import fetch_pretrained, hub_id
from the_mask.weights.pretrained import push_to_hub, read_pretrained, save_pretrained
from the_mask.weights.reading import locate_weights
from the_mask.weights.trained import trained

CONFIG = "configs/debug/swiftnet_debug.yaml"


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    torch.manual_seed(0)
    cfg = load_config(CONFIG, ["MODEL.DEVICE", "cpu", "INPUT.TEST.SHORT_EDGE", "64", "INPUT.TEST.LONG_EDGE", "96"])
    cfg.MODEL.WEIGHTS = str(tmp_path_factory.mktemp("weights") / "model.pth")
    torch.save(build_segmentor(cfg).state_dict(), cfg.MODEL.WEIGHTS)
    return cfg


@pytest.fixture
def folder(cfg, tmp_path):
    return save_pretrained(cfg, tmp_path / "my-model", {"license": "apache-2.0"})


def test_a_folder_holds_the_whole_model(cfg, folder):
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.yaml", "model.safetensors"]
    found, card = read_pretrained(folder, ["MODEL.DEVICE", "cpu"])
    assert card.name == "my-model"
    assert card.facts["license"] == "apache-2.0"
    assert card.facts["library_name"] == "the_mask"
    assert len(card.facts["classes"]) == len(card.facts["colors"]) == 11
    ours, theirs = trained(found).state_dict(), trained(cfg).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert found.INPUT == cfg.INPUT


def test_load_takes_the_folder(cfg, folder):
    frame = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    segmentor = the_mask.load(folder, overrides=["MODEL.DEVICE", "cpu"])
    labels, _ = segmentor.step(frame, segmentor.init_state())
    reference = StreamingSegmentor(cfg)
    expected, _ = reference.step(frame, reference.init_state())
    assert torch.equal(labels, expected)


def test_half_is_half_the_size(cfg, tmp_path, folder):
    half = save_pretrained(cfg, tmp_path / "half", halve=True)
    sizes = [(path / "model.safetensors").stat().st_size for path in (half, folder)]
    assert sizes[0] < 0.6 * sizes[1]


def test_saving_again_keeps_the_prose(cfg, folder):
    card = folder / "README.md"
    card.write_text(card.read_text().replace("to be written", "driving at day; fails at night"))
    save_pretrained(cfg, folder, {"license": "mit"})
    _, again = read_pretrained(folder)
    assert "fails at night" in again.text
    assert again.facts["license"] == "mit"


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml", "README.md"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"is not a model: {name} is missing"):
        the_mask.load(folder)


def test_a_card_that_is_not_utf8_is_named(cfg, folder):
    card = folder / "README.md"
    content = card.read_bytes()
    card.write_bytes(b"\xef\xbb\xbf" + content)  # as Windows' Notepad writes it
    assert read_pretrained(folder)[1].name == "my-model"
    card.write_bytes(content + b"\xe9")
    for read in (lambda: read_pretrained(folder), lambda: save_pretrained(cfg, folder)):
        with pytest.raises(ValueError, match=r"README\.md, line \d+: not UTF-8"):
            read()


def test_configs_of_downloaded_models_run_no_code(folder, tmp_path):
    config = folder / "config.yaml"
    text = config.read_text()
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    config.write_text(
        text + f"\nDATASETS:\n  IMPORT: [{tmp_path / 'evil.py'}]\n"
        if "DATASETS" not in text
        else text.replace("DATASETS:\n", f"DATASETS:\n  IMPORT: [{tmp_path / 'evil.py'}]\n")
    )
    with pytest.raises(ValueError, match=r"DATASETS\.IMPORT runs code"):
        the_mask.load(folder)
    config.write_text("_BASE_: /etc/hostname\n" + text)
    with pytest.raises(ValueError, match="the config of a model is whole"):
        the_mask.load(folder)
    config.write_text("X: !!python/object/apply:os.getcwd []\n" + text)
    with pytest.raises(ValueError, match="refused"):
        the_mask.load(folder)
    assert not (tmp_path / "executed").exists()
    config.write_text(text)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: .*get it again"):
        the_mask.load(folder)


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert hub_id("owner/name") == ("owner/name", None)
    assert hub_id("owner/na.me-1@v1.0") == ("owner/na.me-1", "v1.0")
    assert hub_id("runs/name") is None
    assert hub_id("hf://runs/name") == ("runs/name", None)
    for other in ("name", "a/b/c", "../name", "/tmp/name", "owner/", "owner/name@"):
        assert hub_id(other) is None, other
    with pytest.raises(FileNotFoundError, match="no such folder, config file or hub model"):
        the_mask.load("runs/name")


def test_without_the_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"the_mask\[hub\]\""):
        the_mask.load("owner/name")


class Hub:
    """As much of the hub's interface as uploads and downloads of models use; files and requests are kept in memory."""

    def __init__(self):
        self.repos = {}  # name -> list of (commit, {path: content})
        self.requests = []
        self.private = set()
        # Files from this size on are uploaded in parts by the LFS protocol; parts and whole files by their digest.
        self.large, self.part_size = 1 << 40, 1 << 40
        self.parts, self.objects = {}, {}

    def files(self, repo, revision="main"):
        commits = self.repos[repo]
        if revision == "main":
            return commits[-1]
        return next(((c, f) for c, f in commits if c == revision), (None, None))

    def commit(self, repo, lines):
        _, files = self.repos[repo][-1]
        files = dict(files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                assert len(self.objects[value["oid"]]) == value["size"]
                files[value["path"]] = self.objects[value["oid"]]
        digest = hashlib.sha1(repr(sorted((k, hashlib.sha1(v).hexdigest()) for k, v in files.items())).encode())
        self.repos[repo].append((digest.hexdigest(), files))
        return digest.hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stub hub; the client's cache is empty."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="extra hub is not installed")
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, content=b"", status=200, headers=None, kind="application/json"):
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            headers = {"Content-Type": kind, "Content-Length": str(len(content))} | (headers or {})
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def missing(self, code):
            self.answer({"error": code}, 404, {"X-Error-Code": code, "X-Error-Message": code})

        def body(self):
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = urlsplit(self.path).path
            state.requests.append((self.command, path))
            if path.startswith("/cdn/"):
                content = state.objects[path.rpartition("/")[2]]
                self.answer(content, 200, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'}, "application/octet-stream")
                return
            repo, _, rest = path.strip("/").partition("/resolve/")
            hidden = repo in state.private and self.headers.get("Authorization") != "Bearer hf_right"
            if repo not in state.repos or hidden:
                self.missing("RepoNotFound")
                return
            revision, _, name = rest.partition("/")
            commit, files = state.files(repo, revision)
            if commit is None:
                self.missing("RevisionNotFound")
            elif name not in files:
                self.missing("EntryNotFound")
            elif (oid := hashlib.sha256(files[name]).hexdigest()) in state.objects:
                # Large files lie on another host.
                port = self.headers["Host"].rpartition(":")[2]
                headers = {"Location": f"http://localhost:{port}/cdn/{oid}", "X-Repo-Commit": commit}
                headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(files[name]))}
                self.answer(b"", 302, headers)
            else:
                etag = hashlib.sha256(files[name]).hexdigest()
                self.answer(
                    files[name], 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, "application/octet-stream"
                )

        def do_PUT(self):
            _, _, oid, number = urlsplit(self.path).path.split("/")
            content = self.body()
            state.requests.append(("PUT", number))
            state.parts.setdefault(oid, {})[int(number)] = content
            self.answer(b"", 200, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

        def lfs(self, path, body, address):
            request = json.loads(body)
            if path.startswith("/complete/"):
                parts = state.parts[request["oid"]]
                for part in request["parts"]:
                    assert part["etag"] == f'"{hashlib.md5(parts[part["partNumber"]]).hexdigest()}"'
                whole = b"".join(parts[part["partNumber"]] for part in request["parts"])
                assert hashlib.sha256(whole).hexdigest() == request["oid"]
                state.objects[request["oid"]] = whole
                self.answer({"success": True})
                return
            assert request["operation"] == "upload"
            assert request["hash_algo"] == "sha256"
            objects = []
            for wanted in request["objects"]:
                if wanted["oid"] not in state.objects:
                    count = -(-wanted["size"] // state.part_size)
                    header = {str(i): f"{address}/part/{wanted['oid']}/{i}" for i in range(1, count + 1)}
                    header["chunk_size"] = str(state.part_size)
                    wanted["actions"] = {"upload": {"href": f"{address}/complete/{wanted['oid']}", "header": header}}
                objects.append(wanted)
            self.answer({"transfer": "multipart", "objects": objects})

        def do_POST(self):
            path, body = urlsplit(self.path).path, self.body()
            state.requests.append(("POST", path))
            address = f"http://{self.headers['Host']}"
            if path.startswith("/complete/"):  # signed addresses take no token
                self.lfs(path, body, address)
            elif self.headers.get("Authorization") != "Bearer hf_right":
                self.answer({"error": "not logged in"}, 401)
            elif path == "/api/repos/create":
                request = json.loads(body)
                repo = f"{request['organization']}/{request['name']}"
                if repo in state.repos:
                    self.answer({"error": "exists", "url": f"{address}/{repo}"}, 409)
                    return
                state.repos[repo] = [("0" * 40, {})]
                self.answer({"url": f"{address}/{repo}", "name": repo, "id": repo})
            elif path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif "/preupload/" in path:
                files = json.loads(body)["files"]
                modes = ["lfs" if file["size"] >= state.large else "regular" for file in files]
                self.answer(
                    {
                        "files": [
                            {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                            for file, mode in zip(files, modes, strict=True)
                        ]
                    }
                )
            elif path.endswith(".git/info/lfs/objects/batch"):
                self.lfs(path, body, address)
            elif "/commit/" in path:
                repo = path.removeprefix("/api/models/").partition("/commit/")[0]
                commit = state.commit(repo, [json.loads(line) for line in body.splitlines()])
                url = f"{address}/{repo}/commit/{commit}"
                self.answer({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})
            else:
                self.missing("Unknown")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    state.address, state.stop = address, server.shutdown
    yield state
    server.shutdown()
    server.server_close()


def test_to_the_hub_and_back(hub, cfg, folder):
    url = push_to_hub(folder, "owner/my-model", endpoint=hub.address)
    assert url.startswith(f"{hub.address}/owner/my-model/commit/")
    commit, files = hub.files("owner/my-model")
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}
    place = fetch_pretrained("owner/my-model", endpoint=hub.address)
    assert place != folder
    found, card = read_pretrained(place, ["MODEL.DEVICE", "cpu"])
    ours, theirs = trained(found).state_dict(), trained(cfg).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert card.facts["license"] == "apache-2.0"
    # Fetched once, it is there without a network.
    hub.stop()
    before = len(hub.requests)
    again = fetch_pretrained("owner/my-model", endpoint=hub.address)
    assert again == place
    by_commit, _ = find_model(f"owner/my-model@{commit}")
    assert by_commit.MODEL.WEIGHTS == found.MODEL.WEIGHTS
    assert len(hub.requests) == before


@pytest.mark.parametrize("parts", [1, 4])
def test_large_files_go_and_come_back(hub, cfg, folder, monkeypatch, parts):
    """By LFS, as without hf_xet: batch, parts, completion, commit; downloads are redirected to another address."""
    # Xet's client speaks to servers of its own, which no stub stands for.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    weights = (folder / "model.safetensors").read_bytes()
    hub.large, hub.part_size = len(weights), -(-len(weights) // parts)
    push_to_hub(folder, "owner/my-model", endpoint=hub.address)
    assert [request for request in hub.requests if request[0] == "PUT"] == [("PUT", str(i + 1)) for i in range(parts)]
    assert list(hub.objects) == [hashlib.sha256(weights).hexdigest()]
    _, files = hub.files("owner/my-model")
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}
    place = fetch_pretrained("owner/my-model", endpoint=hub.address)
    assert ("GET", f"/cdn/{hashlib.sha256(weights).hexdigest()}") in hub.requests
    assert (place / "model.safetensors").read_bytes() == weights
    found, _ = read_pretrained(place, ["MODEL.DEVICE", "cpu"])
    ours, theirs = trained(found).state_dict(), trained(cfg).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # What is there already is not sent again.
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nFails at night.\n")
    push_to_hub(folder, "owner/my-model", endpoint=hub.address)
    assert sum(request[0] == "PUT" for request in hub.requests) == parts
    _, files = hub.files("owner/my-model")
    assert files["README.md"] == card.read_bytes()
    assert files["model.safetensors"] == weights


def test_weights_of_a_hub_model_by_address(hub, cfg, folder, monkeypatch):
    """``MODEL.WEIGHTS hf://owner/name``; nothing is fetched for what only looks like a path."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    push_to_hub(folder, "owner/my-model")
    assert locate_weights("hf://owner/my-model").read_bytes() == (folder / "model.safetensors").read_bytes()
    before = len(hub.requests)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        locate_weights("owner/my-model")
    assert len(hub.requests) == before


def test_what_belongs_to_a_machine_is_not_taken_from_others(folder, tmp_path):
    """A training from a foreign model must not write or log where its config says."""
    config = folder / "config.yaml"
    text = config.read_text()
    assert "SOLVER" in text, "the recipe goes with the model"
    foreign = yaml.safe_load(text)
    foreign["OUTPUT_DIR"] = str(tmp_path / "elsewhere")
    foreign["SOLVER"]["TRACKERS"] = ["wandb"]
    foreign.setdefault("TEST", {})["SAVE_PREDICTIONS"] = str(tmp_path / "elsewhere")
    config.write_text(yaml.safe_dump(foreign))
    found, _ = read_pretrained(folder)
    assert found.OUTPUT_DIR == load_config().OUTPUT_DIR
    assert not found.SOLVER.TRACKERS
    assert not found.TEST.SAVE_PREDICTIONS
    own, _ = read_pretrained(folder, ["OUTPUT_DIR", "mine"])
    assert own.OUTPUT_DIR == "mine"


def test_from_pretrained_is_of_a_hub_as_of_a_folder(hub, cfg, folder, monkeypatch):
    """By the client's own address, as users have it; then without a network, and with a revision that is not there."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    push_to_hub(folder, "owner/my-model")
    commit, _ = hub.files("owner/my-model")
    frame = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    options = {"backend": "eager", "overrides": ["MODEL.DEVICE", "cpu"]}
    reference = StreamingSegmentor(cfg)
    expected, _ = reference.step(frame, reference.init_state())

    def labels(name, **more):
        segmentor = the_mask.from_pretrained(name, **options, **more)
        assert isinstance(segmentor, StreamingSegmentor)
        return segmentor.step(frame, segmentor.init_state())[0]

    assert torch.equal(labels("owner/my-model"), expected)
    assert torch.equal(labels("owner/my-model", revision=commit), expected)
    with pytest.raises(FileNotFoundError, match="has no branch, tag or commit 'v9'"):
        labels("owner/my-model", revision="v9")
    hub.stop()
    assert torch.equal(labels("owner/my-model", revision=commit), expected)
    assert torch.equal(labels(f"owner/my-model@{commit}"), expected)
    assert torch.equal(labels(folder), expected)
    for name, revision in ((folder, "main"), ("owner/my-model@v1", "v2")):
        with pytest.raises(ValueError, match=f"revision '{revision}' of .*expected a model of the hub"):
            labels(name, revision=revision)
    with pytest.raises(ValueError, match="backend is 'magic'"):
        the_mask.from_pretrained(folder, backend="magic")


def test_a_private_model_needs_the_token(hub, folder, monkeypatch):
    push_to_hub(folder, "owner/my-model", endpoint=hub.address)
    hub.private.add("owner/my-model")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(FileNotFoundError, match="or it is private and you are not logged in"):
        fetch_pretrained("owner/my-model", endpoint=hub.address)
    place = fetch_pretrained("owner/my-model", token="hf_right", endpoint=hub.address)
    assert read_pretrained(place)[1].name


def test_a_newer_state_is_seen_when_it_is_asked_for(hub, cfg, folder):
    push_to_hub(folder, "owner/my-model", endpoint=hub.address)
    first = fetch_pretrained("owner/my-model", endpoint=hub.address)
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nFails at night.\n")
    push_to_hub(folder, "owner/my-model", endpoint=hub.address)
    assert fetch_pretrained("owner/my-model", endpoint=hub.address) == first
    second = fetch_pretrained("owner/my-model", refresh=True, endpoint=hub.address)
    assert "Fails at night" not in read_pretrained(first)[1].text
    assert "Fails at night" in read_pretrained(second)[1].text


def test_what_can_be_wrong_on_a_hub(hub, folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match="the hub has no model owner/nothing, or it is private"):
        fetch_pretrained("owner/nothing", endpoint=hub.address)
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(
            FileNotFoundError, match=r"owner/nothing: there is no such folder here, .* cannot be reached"
        ):
            fetch_pretrained("owner/nothing", endpoint=hub.address)
    push_to_hub(folder, "owner/my-model", endpoint=hub.address)
    with pytest.raises(FileNotFoundError, match="has no branch, tag or commit 'v9'"):
        fetch_pretrained("owner/my-model", "v9", endpoint=hub.address)
    hub.repos["owner/other"] = [("1" * 40, {"README.md": b"---\nlibrary_name: other\n---\n"})]
    with pytest.raises(FileNotFoundError, match="owner/other on the hub is no model of the_mask"):
        fetch_pretrained("owner/other", endpoint=hub.address)
    (folder / "config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.yaml is missing"):
        push_to_hub(folder, "owner/another", endpoint=hub.address)
    assert "owner/another" not in hub.repos


def test_pushing_needs_the_right(hub, folder):
    with pytest.raises(OSError, match="401"):
        push_to_hub(folder, "owner/my-model", token="hf_wrong", endpoint=hub.address)
    assert not hub.repos


def test_no_file_of_the_library_imports_the_client_at_its_top():
    root = Path(the_mask.__file__).parent
    top = re.compile(r"^(from|import) huggingface_hub", re.MULTILINE)
    assert not [path for path in root.rglob("*.py") if top.search(path.read_text(encoding="utf-8"))]
