"""The licences that the Hub knows by name (https://huggingface.co/docs/hub/repositories-licenses), for model cards."""

import difflib

from adapterhub_local.errors import InputError

OTHER = "other"
_NAMES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 openrail++ "
    "bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc "
    "cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 "
    "cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 "
    "cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 "
    "eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c "
    "ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail-m osl-3.0 postgresql "
    "ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 "
    "llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other"
)
LICENCES = frozenset(_NAMES.split())


def check_licence(licence: str, name: str | None, link: str | None) -> dict[str, str]:
    """The keys of a model card that say `licence`; `other` needs a name and a link. Raises InputError."""
    if licence not in LICENCES:
        near = difflib.get_close_matches(licence.lower()[:60], LICENCES, n=3, cutoff=0.5)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        raise InputError(
            f"{licence[:60]!r} is not a licence that the Hub knows: {meant}One of its own is "
            "--license other --license-name NAME --license-link URL"
        )
    if licence != OTHER:
        if name or link:
            raise InputError(f"--license-name and --license-link are for --license other, not for {licence}")
        return {"license": licence}
    if not name or not link:
        raise InputError("a licence of its own needs a name and a link: --license-name NAME --license-link URL")
    if not link.startswith(("https://", "http://")) and link not in ("LICENSE", "LICENSE.md", "LICENSE.txt"):
        raise InputError(f"{link[:80]!r} is not a link to a licence: give a URL, or LICENSE for a file beside the card")
    return {"license": OTHER, "license_name": name, "license_link": link}
