"""Add a user to the users file of glm web, which contains a hash of the password, or delete a user.

The password is asked for in a terminal, else it is the first line of the standard input. --delete also deletes the
conversations that glm web --conversations server has stored for the user.
"""

import argparse
import getpass
import sys
from dataclasses import replace
from pathlib import Path

from entrypoints.errors import UserError
from entrypoints.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm user`."""
    parser.add_argument("file", type=Path, metavar="FILE", help="users file; created if it does not exist")
    parser.add_argument(
        "name", metavar="NAME", help="name with which the user signs in; appears on the page and in logs"
    )
    change = parser.add_mutually_exclusive_group()
    change.add_argument("--replace", action="store_true", help="give an existing user a new password")
    change.add_argument("--delete", action="store_true", help="delete the user and the user's stored conversations")
    parser.add_argument(
        "--state-dir",
        type=Path,
        help="with --delete: folder of the stored conversations; overrides PAGE_STATE_DIR, without both: the folder of "
        "the users file",
    )
    parser.add_argument(
        "--api-keys-file",
        type=Path,
        metavar="KEYS",
        help="key file of glm serve: also add a key of this name, which the page uses for this user, so that usage and "
        "limits are per user",
    )


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Ask for the password and write the entry; or delete the user.

    Raises UserError: an invalid name or password, a user or key of this name, a file that cannot be written.
    """
    from entrypoints.api.auth import add_key
    from entrypoints.web.users import PageUser, check_name, hash_password, put_user, read_users

    name = check_name(args.name)
    if args.delete:
        _delete(args, settings, name)
        return
    existing = {user.name: user for user in read_users(args.file)} if args.file.exists() else {}
    if name in existing and not args.replace:
        raise UserError(f"{args.file} already has a user {name}", "choose another name, or add --replace")
    if args.replace and name not in existing:
        raise UserError(f"{args.file} has no user {name}", "omit --replace to add the user")
    password = _read_password()
    user = PageUser(name, hash_password(password), existing[name].api_key if name in existing else "")
    put_user(args.file, user)
    if args.api_keys_file:
        put_user(args.file, replace(user, api_key=add_key(args.api_keys_file, name)))
    print(f"user {name} {'changed' if name in existing else 'added'} in {args.file}", file=sys.stderr)


def _delete(args: argparse.Namespace, settings: Settings, name: str) -> None:
    """Delete the user, which ends their sessions, then their conversations.

    Raises UserError: there is neither, or a file cannot be written.
    """
    from entrypoints.web.conversation_database import FILE_NAME, ConversationDatabase
    from entrypoints.web.users import remove_user

    folder = Path(args.state_dir or settings.page_state_dir or args.file.resolve().parent)
    is_removed = remove_user(args.file, name)
    count = ConversationDatabase(folder).remove_user(name) if (folder / FILE_NAME).exists() else 0
    if not is_removed and not count:
        raise UserError(f"{args.file} has no user {name}, and {folder} no conversations of that name", "check the name")
    print(f"user {name} deleted, with {count} stored conversations", file=sys.stderr)


def _read_password() -> str:
    """Raises UserError: it is too short, or the two entries differ."""
    from entrypoints.web.users import check_password

    if not sys.stdin.isatty():
        password = sys.stdin.readline().rstrip("\r\n")
        check_password(password)
        return password
    password = getpass.getpass("password: ")
    check_password(password)
    if getpass.getpass("password again: ") != password:
        raise UserError("the passwords differ", "enter the same password twice")
    return password
