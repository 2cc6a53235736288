"""A text that goes on: tokens of the shipped `shakespeare` model as they are drawn.

Pull the network's plug, restart the service or kill it while the text is running: it goes on where it stood, with the
very tokens that it would have had. Run it again with the same --session: it goes on from what it has written.

    python examples/text_stream.py --prompt 'ROMEO.' --tokens 400
"""

import argparse
import sys

from recurra_client import Client


def main() -> None:
    """Write to standard output; how it ended, to standard error."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--url", default="http://127.0.0.1:8000")
    options.add_argument("--session", help="a memory to go on from; without one it is forgotten at the end")
    options.add_argument("--prompt", default="ROMEO.")
    options.add_argument("--tokens", type=int, default=400)
    options.add_argument("--temperature", type=float, default=0.7)
    options.add_argument("--seed", type=int, default=1)
    chosen = options.parse_args()

    with Client(chosen.url) as client, client.session(chosen.session, model="shakespeare") as play:
        stream = play.generate(
            f"{chosen.prompt}\n",
            max_tokens=chosen.tokens,
            temperature=chosen.temperature,
            seed=chosen.seed,
            stream=True,
        )
        for token in stream:
            print(token.text, end="", flush=True)
        print()
        if stream.done is not None:
            print(f"{stream.done.finish_reason} at position {stream.done.position}", file=sys.stderr)


if __name__ == "__main__":
    main()
