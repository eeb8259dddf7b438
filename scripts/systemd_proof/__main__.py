"""What phid.service and scripts/install promise, tried under a real systemd: see prove-systemd.

Run as root inside a machine made for it: it stops, breaks, upgrades and removes the installation.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from systemd_proof import installation, model, secrets, service  # noqa: E402 - found by the line above
from systemd_proof.machine import words  # noqa: E402

PROMISES: tuple[Callable[[], str], ...] = (
    service.it_runs_as_its_own_user_without_rights_and_behind_the_filter,
    service.it_answers,
    service.the_journal_has_fields_and_priorities,
    service.warnings_are_warnings_in_the_journal,
    service.a_reload_takes_new_settings_without_a_new_process,
    service.a_restart_by_command_keeps_the_process,
    service.a_service_that_stands_still_is_killed_and_started_again,
    service.an_engine_that_is_killed_leaves_the_service_up,
    service.a_kernel_that_ends_the_engine_for_memory_leaves_the_service_up,
    service.a_stop_answers_what_was_accepted,
    service.wrong_settings_end_it_with_78_and_it_is_not_tried_again,
    service.a_rival_ends_it_with_75_and_it_is_not_tried_again,
    service.a_start_that_always_fails_is_given_up_and_taken_up_again,
    secrets.a_credential_reaches_it_and_a_missing_one_is_named,
    secrets.a_rotated_password_and_authority_are_taken_without_a_restart,
    service.a_read_only_disk_is_told,
    installation.a_read_only_var_is_told_by_the_installer,
    installation.a_disk_without_room_is_told_and_changes_nothing,
    installation.run_again_it_changes_nothing,
    installation.limits_of_memory_come_from_the_settings,
    installation.changed_defaults_are_put_beside_the_settings,
    installation.an_upgrade_loses_no_request,
    installation.a_version_that_does_not_become_well_is_rolled_back,
    installation.a_wheel_that_was_changed_is_not_installed,
    installation.settings_cut_off_in_the_middle_stop_an_upgrade_before_it_does_anything,
    installation.uninstalled_it_keeps_what_is_not_its_own,
    installation.installed_again_it_finds_its_state_and_purged_it_leaves_nothing,
    model.without_the_hub_it_is_installed_all_the_same_and_says_how_to_go_on,
    model.the_model_that_fits_is_fetched_from_the_hub_and_answers,
    model.a_folder_that_only_root_reads_is_copied_and_replaced_by_the_daemons_user,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="REGEX", help="just the promises whose name has this")
    options = parser.parse_args()
    broken = tried = 0
    for promise in PROMISES:
        name, began = promise.__name__.replace("_", " "), time.monotonic()
        if options.only and not re.search(options.only, name):
            continue
        tried += 1
        try:
            verdict, says = "ok ", promise()
        except Exception as error:  # noqa: BLE001 - the others are tried too
            verdict, says = (
                "BAD",
                f"{type(error).__name__}: {error}\n{words(time.time() - 60)[-3000:]}",
            )
            broken += 1
        print(f"{verdict} {name} ({time.monotonic() - began:.0f} s)\n      {says}", flush=True)
    print(f"{broken} of {tried} promises are broken" if broken else f"all {tried} are kept")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
