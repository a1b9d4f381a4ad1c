"""The results of the handlers for a source's documented requests, which `relay send` and the demo send."""

from relay.source import Accepted, Incoming, Source


def accept(source: Source, sample: Incoming) -> Accepted | None:
    """Return the result of the handler whose route fits a sample; None if the result has nothing to store."""
    for method, template, handler in source.routes():
        if method == sample.method and fits(template, sample.path):
            accepted = getattr(source, handler)(sample)
            if isinstance(accepted, Accepted):
                return accepted
    return None


def fits(template: str, path: str) -> bool:
    """Return whether a path matches the template of a route."""
    ours, theirs = template.split("/"), path.split("/")
    return len(ours) == len(theirs) and all(
        one.startswith("{") or one == other for one, other in zip(ours, theirs, strict=True)
    )
