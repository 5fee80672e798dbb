"""Every error this project raises on purpose.

    QhubError              exit code 1: something failed although the request was sound
    ├── Corrupt            stored or received bytes are not what they should be
    ├── RemoteError        a store of versions elsewhere refused or did not answer
    ├── HubError           the Hugging Face Hub refused or did not answer
    ├── OverQuota          the home would hold more than its config allows
    ├── Stopped            the user stopped the work; what was done is kept (exit code 130)
    └── InputError         exit code 2: the request itself is wrong
        ├── BadReference   a name, reference or mix that cannot be parsed
        ├── BadRecipe      a recipe that cannot be used, with file, line and key
        ├── BadData        a data file that cannot be used, with file and line
        ├── BadFile        an adapter or model file that cannot be read or is not supported
        ├── NotFound       no such adapter, version, alias, base or repository
        ├── Incompatible   two things that do not belong together, such as an adapter and a base
        └── InUse          would overwrite or remove something that is needed
            └── Protected  would move a protected alias against its protection

A message says what is wrong, where, and what to do. The command line prints it as one line
(`cli/main.py`), the server maps it to an OpenAI error body (`serve/errors.py`):

    try:
        version = Registry().resolve("sentiment@prod")
    except NotFound as error:
        print(error)
"""


class QhubError(Exception):
    """Base of all errors below; `exit_code` is what the command line returns."""

    exit_code = 1


class Corrupt(QhubError):
    """Stored or received bytes are not what they should be."""


class RemoteError(QhubError):
    """A store of versions elsewhere refused a request or did not answer."""


class HubError(QhubError):
    """The Hugging Face Hub refused a request or did not answer."""


class OverQuota(QhubError):
    """The home would hold more than its config allows."""


class Stopped(QhubError):
    """The user stopped the work; what was done is kept."""

    exit_code = 130


class InputError(QhubError):
    """The request itself is wrong; nothing was changed."""

    exit_code = 2


class BadReference(InputError):
    """A name, reference or mix that cannot be parsed."""


class BadRecipe(InputError):
    """A recipe that cannot be used."""


class BadData(InputError):
    """A data file that cannot be used."""


class BadFile(InputError):
    """An adapter or model file that cannot be read or is not supported."""


class NotFound(InputError):
    """No such adapter, version, alias, base or repository."""


class Incompatible(InputError):
    """Two things that do not belong together."""


class InUse(InputError):
    """The request would overwrite or remove something that is needed."""


class Protected(InUse):
    """The request would move a protected alias against its protection."""
