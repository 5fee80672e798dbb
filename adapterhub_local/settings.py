"""Where things live: the only reader of this project's environment variables.

QHUB_HOME    the home of registry, bases and runs      default ~/.qhub
QHUB_API_KEY what `qhub chat` sends to the server, and verbs to QHUB_SERVER     default none
QHUB_SERVER  the server whose registry list, show, alias and others work on, not the home's     default none
QHUB_DEVICE  where bases are loaded: auto, cpu, cuda   default auto (the GPU if there is one)
QHUB_COMPUTE  the dtype of activations that `auto` means, in training and in scoring: auto, float32, bfloat16
             default auto (bfloat16 where the hardware multiplies it)
RANK, LOCAL_RANK, WORLD_SIZE   which of several training processes this is; torchrun and `qhub train --nproc` set them
TORCHELASTIC_RESTART_COUNT     how often torchrun has started these processes again; it sets it
ACCELERATE_USE_FSDP            whether `accelerate launch` shards the model, which training refuses
XDG_DATA_HOME, XDG_CONFIG_HOME  where the completion of shells is installed  default ~/.local/share, ~/.config
CC, XDG_CACHE_HOME  the C compiler of the server's kernels, and where these are kept  default cc or like it, ~/.cache
RAY_ADDRESS, RAY_AUTH_MODE     the Ray cluster that `qhub cluster` joins, and whether it wants a token   default none
QHUB_REDIS_PASSWORD, REDISCLI_AUTH  the password of the Redis of `qhub serve --limits`; the first that is set, the
             second is what redis-cli reads                   default none
OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT  the collector that `qhub serve` sends traces to without
             --otlp, the second goes first; not if OTEL_SDK_DISABLED is true, or OTEL_TRACES_EXPORTER none. Other
             variables of OpenTelemetry are its SDK's own         default none: no traces
QHUB_VLLM_BASE  the base whose adapters vLLM loads      default the one made of the model that it serves
QHUB_VLLM_REMOTE  a remote, by name or URL, that has what vLLM asks for and the home has not   default none
QHUB_ALLOW_CODE  if 1, Python code that a recipe names is run, as with --allow-code   default none: it is refused
GOMP_SPINCOUNT, OMP_WAIT_POLICY  how long threads that compute wait awake   default 1000 turns in the server
NO_COLOR     if set, output has no colours
QHUB_ACTOR   who makes the changes of this process, for their records   default the user at this machine
QHUB_TRUSTED_KEYS  public keys, separated by ':'; pulls must be signed with one   default none: unsigned is taken
"""

import os
import pwd
import shlex
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from adapterhub_local.durable import may_write, share_parents
from adapterhub_local.errors import InputError

DEVICES = ("auto", "cpu", "cuda")
COMPUTE = ("auto", "float32", "bfloat16")
SPINS = "1000"  # of GNU OpenMP's loop: about 0.01 ms


@dataclass(frozen=True)
class Home:
    """The folders of one QHUB_HOME. Nothing is created until something is written."""

    root: Path

    @property
    def database(self) -> Path:
        return self.root / "registry.db"

    @property
    def ledger(self) -> Path:
        """What was ever committed to the database, which may be deleted or come back from a backup."""
        return self.root / "registry.ledger"

    @property
    def receipts(self) -> Path:
        """One file for each version that was committed: what a database and a ledger from a backup cannot unmake."""
        return self.root / "blobs" / "receipts"

    @property
    def changes(self) -> Path:
        """One file for each of the last changes of any kind, named by its number: likewise."""
        return self.root / "blobs" / "changes"

    @property
    def repair_lock(self) -> Path:
        """Held by the one process that repairs."""
        return self.root / "repair.lock"

    @property
    def blobs(self) -> Path:
        return self.root / "blobs" / "sha256"

    @property
    def bases(self) -> Path:
        return self.root / "bases"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def folders(self) -> Path:
        """Folders of links to blobs that PEFT can load; may be deleted at any time."""
        return self.root / "folders"

    @property
    def signatures(self) -> Path:
        """Signatures of contents, by content digest."""
        return self.root / "signatures"

    @property
    def keys(self) -> Path:
        """The API keys of the server, as hashes."""
        return self.root / "keys.json"

    @property
    def config(self) -> Path:
        """What its owner wants of it: how much it may hold, and who is notified of changes."""
        return self.root / "config.toml"

    @property
    def hooks(self) -> Path:
        """What each hook was notified of, and the secrets that sign it."""
        return self.root / "hooks"

    @property
    def tmp(self) -> Path:
        return self.root / "tmp"

    @property
    def scratch(self) -> Path:
        """Where a verb that only reads puts what it makes on the way: `tmp`, or a place of this user's."""
        return self.tmp if may_write(self.root) and may_write(self.tmp) else private_folder() / "tmp"

    @property
    def views(self) -> Path:
        """`folders` of a home that cannot be written, in a place of this user's."""
        return private_folder() / "folders"

    @property
    def quarantine(self) -> Path:
        """What was set aside: damaged blobs and databases, and blobs nothing needs any more."""
        return self.root / "quarantine"


def server() -> str | None:
    """The address in QHUB_SERVER, None if there is none."""
    return os.environ.get("QHUB_SERVER") or None


def api_key() -> str | None:
    """The value of QHUB_API_KEY, None if there is none."""
    return os.environ.get("QHUB_API_KEY") or None


def redis_password() -> str | None:
    """The value of QHUB_REDIS_PASSWORD, else of REDISCLI_AUTH, which redis-cli reads; None if neither is set."""
    return os.environ.get("QHUB_REDIS_PASSWORD") or os.environ.get("REDISCLI_AUTH") or None


def otlp_endpoint() -> str | None:
    """The collector that OpenTelemetry's variables name for traces, None if they name none or switch traces off."""
    is_off = (os.environ.get("OTEL_SDK_DISABLED") or "").strip().lower() == "true"
    if is_off or (os.environ.get("OTEL_TRACES_EXPORTER") or "").strip() == "none":
        return None
    names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    return next((found for found in map(os.environ.get, names) if found), None)


def docker_config() -> Path:
    """Where Docker, podman and oras keep the credentials of registries: below DOCKER_CONFIG, or ~/.docker."""
    return Path(os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")) / "config.json"


def vllm_base() -> str | None:
    """The value of QHUB_VLLM_BASE, None if there is none."""
    return os.environ.get("QHUB_VLLM_BASE") or None


def vllm_remote() -> str | None:
    """The value of QHUB_VLLM_REMOTE, None if there is none."""
    return os.environ.get("QHUB_VLLM_REMOTE") or None


def environment_of_vllm(place: Home, base: str) -> dict[str, str]:
    """This process's environment, for a vLLM of another environment whose adapters are those of `base` in `place`."""
    plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name and name != "qhub"]
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    own = {"QHUB_HOME": str(place.root), "QHUB_VLLM_BASE": base, "VLLM_PLUGINS": ",".join([*plugins, "qhub"])}
    return {**inherited, **own, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1"}


def claimed_actor() -> str | None:
    """The value of QHUB_ACTOR, None if there is none."""
    return os.environ.get("QHUB_ACTOR") or None


def user_name() -> str:
    """The name of the user this process runs as, its number if it has no name."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's, as a rule
        return str(os.geteuid())


def environment_in(place: Home, actor: str | None = None) -> dict[str, str]:
    """This process's environment, for one that it starts to work in the same home, as `actor` if one is given."""
    own = {name: value for name, value in os.environ.items() if name != "QHUB_SERVER"}
    return {**own, "QHUB_HOME": str(place.root)} | ({"QHUB_ACTOR": actor} if actor is not None else {})


def compiler() -> list[str]:
    """The words of $CC, the command of a C compiler; none if it is not set."""
    return shlex.split(os.environ.get("CC", ""))


def cache() -> Path:
    """The user's folder for what can be made again and depends on the machine, not on a home.

    A relative XDG_CACHE_HOME is ignored, as its specification has it: it would be another folder at every start.
    """
    chosen = os.environ.get("XDG_CACHE_HOME") or ""
    return Path(chosen if os.path.isabs(chosen) else os.path.expanduser("~/.cache")) / "adapterhub-local"


def data_folder() -> Path:
    """Where programs keep what belongs to a user: XDG_DATA_HOME, else ~/.local/share."""
    return _absolute("XDG_DATA_HOME", "~/.local/share")


def config_folder() -> Path:
    """Where programs keep a user's settings: XDG_CONFIG_HOME, else ~/.config."""
    return _absolute("XDG_CONFIG_HOME", "~/.config")


def _absolute(name: str, default: str) -> Path:
    chosen = os.environ.get(name) or ""
    return Path(chosen if os.path.isabs(chosen) else os.path.expanduser(default))


def private_folder() -> Path:
    """A folder that only this user may write: in the cache, or beside other temporary files."""
    try:
        share_parents(cache())
        if may_write(cache()):
            return cache()
    except OSError:
        pass
    folder = Path(tempfile.gettempdir()) / f"adapterhub-local-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise InputError(f"{folder} cannot be created: {error.strerror}. Set TMPDIR to a writable folder") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise InputError(f"{folder} is not this user's alone: remove it, or set TMPDIR to another folder")
    return folder


def home(root: str | Path | None = None) -> Home:
    """The home at `root`, else at $QHUB_HOME, else ~/.qhub."""
    chosen = root if root is not None else os.environ.get("QHUB_HOME") or "~/.qhub"
    path = Path(os.path.expanduser(chosen)).absolute()  # Path.expanduser raises for ~nobody
    if path.exists() and not path.is_dir():
        raise InputError(f"QHUB_HOME is {path}, which is a file: name a folder")
    return Home(path)


def ray_address() -> str | None:
    """The value of RAY_ADDRESS, None if there is none."""
    return os.environ.get("RAY_ADDRESS") or None


def has_ray_token() -> bool:
    """Whether Ray is to be spoken to with a token."""
    return (os.environ.get("RAY_AUTH_MODE") or "").lower() == "token"


def ray_environment(token: Path) -> dict[str, str]:
    """What a Ray of our own is started with: it requires the token in this file, and reports no usage."""
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    return {**own, "RAY_ADDRESS": "", "RAY_SERVE_LOG_TO_STDERR": "0"}


def use_ray_token(token: Path) -> None:
    """Have this process speak to a Ray of our own; before Ray is imported, which reads it then."""
    os.environ.update(ray_environment(token))


def is_in_home(path: object) -> bool:
    """Whether an error is about something in the home."""
    return isinstance(path, str) and Path(path).is_relative_to(home().root)


def wants_colour() -> bool:
    """Whether colours may be used on a terminal: not with NO_COLOR (https://no-color.org)."""
    return not os.environ.get("NO_COLOR")


def allow_code() -> None:
    """Have this process, and those it starts, run the Python code that recipes name."""
    os.environ["QHUB_ALLOW_CODE"] = "1"


def allows_code() -> bool:
    """Whether the Python code that recipes name may be run: QHUB_ALLOW_CODE is 1."""
    return os.environ.get("QHUB_ALLOW_CODE") == "1"


def wait_briefly() -> None:
    """Have threads that compute sleep soon where they wait for each other, before torch is imported: in the server.

    GNU OpenMP, which torch brings along, lets them spin for milliseconds. A step has hundreds of parallel regions: when
    other work takes the core of one thread, the others burn theirs until it has it back, and no core is ever free for
    it to move to. Training keeps the default and takes fewer threads meanwhile (`cores.py`): there Python runs between
    regions, and to wake threads costs 10 to 20 % on a quiet machine (benchmarks/busy.py).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def are_threads_given() -> bool:
    """Whether the user has said how many threads compute."""
    return bool(os.environ.get("OMP_NUM_THREADS") or os.environ.get("MKL_NUM_THREADS"))


def make_folder(folder: Path) -> None:
    """Create a folder of a home. Raises InputError if it cannot be created.

    In a folder that a group shares (its setgid bit is set and the group may write) it is the group's, too,
    whatever the umask of whoever makes it.
    """
    try:
        share_parents(folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be created: {error.strerror}. Set QHUB_HOME to a writable folder") from None


@dataclass(frozen=True)
class Process:
    """Which of several training processes this is: `rank` of `world_size`, `local_rank` on this machine."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_leader(self) -> bool:
        return self.rank == 0


def process() -> Process:
    """This process's place, as torchrun sets it. Raises InputError for what is not a number."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    try:
        rank, local_rank, world_size = (
            int(os.environ.get(name) or default) for name, default in zip(names, (0, 0, 1), strict=True)
        )
    except ValueError:
        raise InputError(f"{', '.join(names)} must be whole numbers: they are set by torchrun, unset them") from None
    return Process(rank, local_rank, world_size)


def restarts() -> int | None:
    """How often torchrun has started the training processes again after one was lost; None without torchrun."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT") or ""
    return int(count) if count.isascii() and count.isdigit() else None


def is_sharded() -> bool:
    """Whether `accelerate launch` shards the model (FSDP)."""
    return (os.environ.get("ACCELERATE_USE_FSDP") or "false").lower() in ("true", "1", "yes")


def environment_of(place: Process, num_here: int, host: str, port: int) -> dict[str, str]:
    """The environment of one of several training processes, of which `num_here` are on this machine, in torchrun's
    words; the first of all listens at host and port."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // num_here))
    return {
        **os.environ,
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(place.world_size),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": threads,  # as many processes with all threads each would hinder each other
    }


def trusted_keys() -> tuple[Path, ...]:
    """The public keys of QHUB_TRUSTED_KEYS. Raises InputError if one is not a file."""
    paths = tuple(Path(os.path.expanduser(part)) for part in (os.environ.get("QHUB_TRUSTED_KEYS") or "").split(":"))
    keys = tuple(path for path in paths if path != Path())
    for key in keys:
        if not key.is_file():
            raise InputError(f"QHUB_TRUSTED_KEYS names {key}, which is not a file: name public keys in PEM files")
    return keys


def device() -> str:
    """The value of QHUB_DEVICE: auto, cpu or cuda."""
    return _one_of("QHUB_DEVICE", DEVICES)


def compute() -> str:
    """The value of QHUB_COMPUTE: auto, float32 or bfloat16."""
    return _one_of("QHUB_COMPUTE", COMPUTE)


def _one_of(name: str, values: tuple[str, ...]) -> str:
    value = os.environ.get(name) or "auto"
    if value not in values:
        raise InputError(f"{name} is '{value}': use one of {', '.join(values)}")
    return value
