"""``python -m shifcon_fast``, and the ``shifcon`` script: the command, or what is missing for it."""

from __future__ import annotations

from shifcon_fast.extras import MissingExtraError


def main() -> None:
    """Run the command; without the packages that it is made of, say in one line what to install."""
    try:
        from shifcon_fast import cli
    except MissingExtraError as error:
        raise SystemExit(f"error: {error}") from None
    cli.main()


if __name__ == "__main__":
    main()
