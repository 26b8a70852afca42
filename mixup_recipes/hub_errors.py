"""What went wrong with the Hub, in one line. Its clients raise some twenty types, which wrap each other."""


def innermost(error: BaseException) -> BaseException:
    """The Hub's answer where a client has wrapped it, else the error itself."""
    cause: BaseException | None = error
    while cause is not None and not hasattr(cause, "response") and not is_network(cause):
        cause = cause.__cause__
    return cause or error


def reason(error: BaseException, token: str = "") -> str:
    """An error in one line, without the token."""
    error = innermost(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    words = " ".join(str(error).split())
    if status is not None:
        said = getattr(error, "server_message", None) or words
        advice = {
            401: "the Hub does not take this token, or there is no such repository",
            403: "this token may not do that",
        }.get(status)
        words = f"the Hub answered {status}: {f'{advice} ({said})' if advice else said}"
    elif isinstance(error, OSError) and error.errno is not None:
        words = f"{error.filename or 'the Hub'}: {error.strerror}"
    elif is_network(error):
        words = f"cannot reach the Hub: {words or type(error).__name__}"
    else:
        words = f"{type(error).__name__}: {words}"
    return (words.replace(token, "***") if token else words)[:400]


def is_network(error: BaseException) -> bool:
    """Whether no answer came: huggingface_hub's HTTP library (its name changes) calls these transport errors."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"TransportError", "ConnectionError", "TimeoutError"}) and "OfflineModeIsEnabled" not in names


def passing(error: BaseException) -> bool:
    """Whether a new attempt may help: no answer, too many requests, another commit just then, a server in trouble."""
    error = innermost(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None:
        return is_network(error)
    if status == 400:  # the storage behind the Hub: bytes that changed on their way
        return error.response.request.method == "PUT"  # type: ignore[attr-defined]  # the error's own is not set
    return status in (408, 409, 412, 429) or status >= 500


def wanted_pause(error: BaseException) -> float:
    """Seconds that the Hub asks to wait (Retry-After), else 0."""
    headers = getattr(getattr(innermost(error), "response", None), "headers", None) or {}
    try:
        return max(0.0, float(headers.get("Retry-After", 0)))
    except ValueError:
        return 0.0  # a date
