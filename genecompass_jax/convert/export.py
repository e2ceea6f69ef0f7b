"""A model as files of the original: weights, config, and a model card."""

import io
import os

import numpy as np

from genecompass_jax import (
  errors,
  model_card,
  paths,
  pretrained,
  tensor_files,
)
from genecompass_jax.convert import original, state_dict

_WEIGHTS = 'model.safetensors'  # in a folder


def write(model: pretrained.PretrainedModel, output: str) -> list[str]:
  """Writes a model under the original's names.

  Args:
    model: a restored model.
    output: a .safetensors or .npz file, or a folder for `model.safetensors`.

  Returns:
    Places of the files: weights first, then what was written beside them.

  Raises:
    UserError: the file is there already, or the original has no place for a
      part of the model.
  """
  paths.check_writable(output)
  if not output.endswith(('.safetensors', '.npz')):
    if paths.exists(output) and not tensor_files.is_folder(output):
      raise errors.UserError(
        f'{output}: name a .safetensors or .npz file with -o, or a folder'
      )
    output = paths.join(output, _WEIGHTS)
  if paths.exists(output):
    raise errors.UserError(f'{output} is there already; name another with -o')
  tensors = state_dict.state_dict(model)
  config, card = (beside(output, n) for n in (original.CONFIG, model_card.NAME))
  paths.write_json(config, state_dict.original_config(model))
  if output.endswith('.npz'):
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **tensors)
    paths.write_bytes(output, buffer.getvalue())
  else:
    tensor_files.write_safetensors(output, tensors)
  page = model_card.text(
    model.config,
    model.assets,
    loading=_loading(output, config),
    step=model.step,
    provenance=model.provenance,
    hashes={
      os.path.basename(place): paths.sha256_file(place)
      for place in (output, config)
    },
  )
  paths.write_text(card, page)
  return [output, config, card]


def _loading(output: str, config: str) -> str:
  """How the original takes the weights, and how this package does."""
  file, config = os.path.basename(output), os.path.basename(config)
  if file.endswith('.npz'):
    return f"import numpy as np\n\ntensors = np.load('{file}')"
  return (
    '# in the original: a model of the config beside, and then\n'
    'import safetensors.torch\n\n'
    f"model.load_state_dict(safetensors.torch.load_file('{file}'))\n\n"
    '# here: genecompass convert pytorch\n'
    f'#   {file} --config {config} -o FOLDER'
  )


def beside(output: str, name: str) -> str:
  """A place for a file beside an export; others' files stay as they are.

  A name that is taken is put behind that of the export.

  Raises:
    UserError: that is taken, too.
  """
  folder, _, file = output.rpartition('/')
  stem = file.rpartition('.')[0] or file
  for candidate in (name, f'{stem}.{name}'):
    place = f'{folder}/{candidate}' if folder else candidate
    if not paths.exists(place):
      return place
  raise errors.UserError(
    f'{place} is there already; name another export with -o'
  )
