"""What the SDKs' own models say of a reply, for the scripts beside this one."""
import pydantic


def extras(value, path=""):
    """Keys that a model of the package does not know."""
    if isinstance(value, pydantic.BaseModel):
        yield from (path + name for name in value.model_extra or {})
        for name in type(value).model_fields:
            yield from extras(getattr(value, name, None), f"{path}{name}.")
    elif isinstance(value, list):
        for one in value:
            yield from extras(one, path)
