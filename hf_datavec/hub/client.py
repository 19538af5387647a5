"""The Hub's own client, and what it raises in words."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

from hf_datavec import __version__
from hf_datavec.errors import InputError, RunError
from hf_datavec.progress import wanted

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Whose token the calls of this task carry: a text, False for none, None for the one of the environment or login.
_token: ContextVar[str | bool | None] = ContextVar("hub_token", default=None)
LOGIN = "log in with `hf auth login` or set HF_TOKEN, and ask the owner for access"


@contextlib.contextmanager
def identified(token: str | bool | None) -> Iterator[None]:
    """Let the calls inside the block carry this token; None leaves the one that is in use."""
    before = _token.set(_token.get() if token is None else token)
    try:
        yield
    finally:
        _token.reset(before)


def client() -> HfApi:
    """The client for the Hub that HF_ENDPOINT names; telemetry is off unless the user asked for it."""
    if "HF_HUB_DISABLE_TELEMETRY" not in os.environ:
        from huggingface_hub import constants

        # A hospital's tool reports nothing to anybody; both names are the client's own.
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        constants.HF_HUB_DISABLE_TELEMETRY = True
    from huggingface_hub import HfApi, logging
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    logging.set_verbosity_error()  # type: ignore[no-untyped-call] # its retries name signed addresses, and our own message says what failed
    if not wanted():
        disable_progress_bars()
    return HfApi(library_name="hf-datavec", library_version=__version__, token=_token.get())


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Turn what the client raises into one message that names the repo, what was seen and the next step."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined] # httpx or its successor, whichever is in use

    try:
        yield
    except errors.RevisionNotFoundError:
        raise InputError(f"the Hub repo {what} has no such revision", hint="check the branch, tag or commit") from None
    except errors.GatedRepoError:
        raise InputError(f"the Hub repo {what} is gated", hint="ask for access on its page, then log in") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"there is no Hub repo {what}, or you may not see it", hint=LOGIN) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise InputError(
            f"the Hub repo {what} is not in the cache, and the Hub cannot be reached",
            hint="check HF_HUB_OFFLINE, HF_ENDPOINT and the network, or fetch it once while online",
        ) from None
    except errors.EntryNotFoundError as error:
        raise InputError(f"the Hub repo {what} lacks a file: {_first_line(error)}") from None
    except errors.HfHubHTTPError as error:
        raise _refused(what, error) from None
    except errors.HFValidationError as error:
        raise InputError(f"the Hub's client refuses {what}: {_first_line(error)}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:  # a login page of the network's, say
        raise RunError(
            f"the answer of the Hub for {what} is not what a Hub says ({type(error).__name__})",
            hint="check HF_ENDPOINT, and whether a proxy or a login page stands in between; then run it again",
        ) from None
    except ValueError as error:  # how the client tells of a card that the Hub does not accept
        raise InputError(f"the Hub refuses {what}: {' '.join(str(error).split())}") from None
    except httpx.HTTPError as error:
        raise RunError(f"the connection to the Hub broke for {what} ({type(error).__name__})", hint=AGAIN) from None
    except ConnectionError as error:
        raise _unreachable(what, error) from None
    except RuntimeError as error:  # what the client wraps a failed upload in
        raise RunError(f"the upload to {what} broke: {_first_line(error)}", hint=AGAIN) from None


AGAIN = "run the same command again; what is complete is not sent or fetched twice"


def _refused(what: str, error: Exception) -> Exception:
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = getattr(error, "server_message", None)
    reason = f": {said}" if said else ""
    if status in (401, 403):
        return InputError(f"the Hub refuses access to {what} ({status}){reason}", hint=LOGIN)
    if status == 412:
        return RunError(f"{what} changed on the Hub while we worked, and nothing was written", hint="run it again")
    if status == 409:
        return RunError(f"the Hub reports a conflict for {what}{reason}", hint="run it again")
    if status == 429:
        return RunError(f"the Hub asks to slow down for {what} (429)", hint="wait a minute and run it again")
    return RunError(f"the Hub answered {status} for {what}{reason}", hint=AGAIN)


def _unreachable(what: str, error: Exception) -> Exception:
    if "xet" in str(error):
        return RunError(
            f"the server of {what} has no xet storage",
            hint="set HF_HUB_DISABLE_XET=1 to send large files by LFS",
        )
    return RunError(f"the Hub cannot be reached for {what} ({type(error).__name__})", hint=AGAIN)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
