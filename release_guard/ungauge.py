"""Authorised merging: the release back in the weights before its gauge, for whoever has the record.

Only the gauge is taken back. What was trained cannot be: where a stage also trained, authorised
merges start from the undefended model.
"""

from pathlib import Path

from release_guard.gauging import GaugeRecord, taken_back
from release_guard.modalities import Modality
from release_guard.run import folder_made_whole
from release_guard.sources import local_folder


def ungauge(source: str, private: Path, output: Path) -> GaugeRecord:
    """Write the model before its gauge to a folder.

    Args:
        source: Folder or Hub id of the release.
        private: The record that its owner kept.
        output: What is made; its name is given only to the whole.

    Raises:
        ModelError: The record or the model cannot be read.
        IntegrityError: They do not belong together.
        ReleaseGuardError: The folder cannot be written.
    """
    record = GaugeRecord.load(private)
    model = Modality.build(record.modality).load(str(local_folder(source)))
    plain = taken_back(model, record)
    with folder_made_whole(output) as folder:
        plain.save(folder)
    return record
