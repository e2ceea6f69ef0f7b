"""The genes behind the tokens of converted weights.

The release comes with three kinds of dictionaries, as pickles:

  human_mouse_tokens      {Ensembl id, '<pad>' or '<mask>': token}
  homologous_hm_token     {token of a mouse gene: token of its human orthologue}
  ..._gene_median_...     {Ensembl id: non-zero median}, a file a species

They are read without unpickling; json, csv and tsv do as well. A mouse gene
with an orthologue is read as the human token, and divided by the human median:
measured on the published mouse corpus (see `Medians.divisor_V`).
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from genecompass_jax import (
  assets as assets_lib,
  encoding as encoding_lib,
  errors,
  knowledge as knowledge_lib,
  medians as medians_lib,
  model as model_lib,
  paths,
  vocabulary as vocabulary_lib,
)
from genecompass_jax.prepare.readers import dictionaries

_SPECIAL = {'<pad>': vocabulary_lib.PAD, '<mask>': vocabulary_lib.MASK}
_OURS = b'#format: genecompass_jax'
_GZIP = b'\x1f\x8b'


@dataclasses.dataclass(frozen=True)
class GeneFiles:
  """Files that say what the tokens are; '' and () for none.

  Attributes:
    vocabulary: of `Vocabulary.save`.
    tokens: the release's dictionary, in place of `vocabulary`.
    orthologues: the release's map of mouse to human tokens, with `tokens`;
      without it pairs are read back from the weights.
    medians: of `Medians.save`, or the release's, of one species or several.
  """

  vocabulary: str = ''
  tokens: str = ''
  orthologues: str = ''
  medians: Sequence[str] = ()

  def __post_init__(self):
    """Refuses what does not go together."""
    if self.vocabulary and self.tokens:
      raise errors.UserError(
        'give --vocabulary or --tokens: both say what the tokens are'
      )
    if self.orthologues and not self.tokens:
      raise errors.UserError(
        '--orthologues is of the dictionary of tokens: give --tokens too'
      )
    is_named = self.vocabulary or self.tokens
    if bool(self.medians) != bool(is_named) and not self.tokens:
      raise errors.UserError(
        'give --vocabulary (or --tokens) and --medians together: counts need '
        'both'
      )


def with_genes(
  assets: assets_lib.Assets,
  config: model_lib.ModelConfig,
  files: GeneFiles,
) -> tuple[assets_lib.Assets, list[str]]:
  """Assets that can encode counts: with the genes behind the tokens.

  Args:
    assets: of converted weights, which know tokens only.
    config: of the model.
    files: of the genes.

  Returns:
    Assets, and lines that say what was found.

  Raises:
    UserError: sizes disagree, or a file is not what it should be.
  """
  notes: list[str] = []
  if files.tokens:
    vocabulary = _released_vocabulary(assets.knowledge, config, files, notes)
  elif files.vocabulary:
    vocabulary = vocabulary_lib.Vocabulary.load(files.vocabulary)
    _check_size(files.vocabulary, vocabulary.size, config)
  else:
    return assets, notes
  assets = dataclasses.replace(assets, vocabulary=vocabulary)
  if not files.medians:
    notes.append(
      'no --medians: the model knows the names of tokens, and no counts'
    )
    return assets, notes
  if _is_ours(files.medians[0]):
    if len(files.medians) > 1:
      raise errors.UserError(
        f'{files.medians[0]} is of all species; give no other --medians'
      )
    medians = medians_lib.Medians.load(files.medians[0], vocabulary)
  else:
    medians = _released_medians(files.medians, vocabulary, notes)
  encoding = encoding_lib.EncodingConfig(
    mode=medians.mode, max_genes=min(config.max_genes, 2048)
  )
  return (
    dataclasses.replace(assets, medians=medians, encoding=encoding),
    notes,
  )


def _check_size(path: str, size: int, config: model_lib.ModelConfig) -> None:
  if size != config.vocabulary_size:
    raise errors.UserError(
      f'{path}: {size} tokens, the weights have {config.vocabulary_size} (rows '
      'of the word embedding, entries of homologous_index); they are not of '
      'one model'
    )


def _is_ours(path: str) -> bool:
  """Whether a file is a table of this package."""
  try:
    data = paths.read_bytes(path)
    if data.startswith(_GZIP):
      unpacked = zlib.decompressobj(wbits=31)  # of gzip
      data = unpacked.decompress(data, len(_OURS))
  except FileNotFoundError:
    raise errors.UserError(f'{path}: no such file') from None
  except zlib.error as error:
    raise errors.UserError(
      f'{path}: damaged ({error}); fetch it again'
    ) from None
  return data.startswith(_OURS)


def _released_vocabulary(
  knowledge: knowledge_lib.Knowledge,
  config: model_lib.ModelConfig,
  files: GeneFiles,
  notes: list[str],
) -> vocabulary_lib.Vocabulary:
  """The vocabulary of the release's dictionaries."""
  token_of = _whole(files.tokens, dictionaries.load(files.tokens, ('token',)))
  for name, token in _SPECIAL.items():
    if token_of.pop(name, token) != token:
      raise errors.UserError(
        f'{files.tokens}: {name} must be token {token}, as the model has it'
      )
  size = len(token_of) + vocabulary_lib.NUM_SPECIAL
  _check_size(files.tokens, size, config)
  gene_of = {token: gene_id for gene_id, token in token_of.items()}
  wanted = range(vocabulary_lib.NUM_SPECIAL, size)
  if empty := [token for token in wanted if token not in gene_of]:
    raise errors.UserError(
      f'{files.tokens}: no gene has token {empty[0]}, so another token stands '
      'for several; it is no dictionary of this model'
    )
  homologs_V = knowledge.row_SV[1] if config.num_species > 1 else None
  if files.orthologues:
    pairs = _pairs(files.orthologues)
    if homologs_V is not None:
      _check_pairs(files.orthologues, pairs, np.asarray(homologs_V))
  elif homologs_V is not None:
    human_V = np.flatnonzero(homologs_V != np.arange(size))
    pairs = {int(homologs_V[t]): int(t) for t in human_V}
    notes.append(
      f'{len(pairs):,} pairs of orthologues read back from the weights, one '
      'mouse gene a human one; --orthologues has all'
    )
  else:
    pairs = {}
  missing = [t for pair in pairs.items() for t in pair if t not in gene_of]
  if missing:
    raise errors.UserError(
      f'{files.orthologues or "homologous_index"}: token {missing[0]} is that '
      f'of no gene in {files.tokens}'
    )
  named = {gene_of[mouse]: gene_of[human] for mouse, human in pairs.items()}
  try:
    vocabulary = vocabulary_lib.Vocabulary.from_tokens(token_of, named)
  except errors.UserError as error:
    raise errors.UserError(
      f'{files.orthologues or files.tokens}: {error}'
    ) from error
  of_species = [
    int((vocabulary.genes.species_G == s).sum())
    for s in range(len(vocabulary.species))
  ]
  notes.append(
    f'{size:,} tokens: {of_species[0]:,} human and {of_species[1]:,} mouse '
    f'genes, {len(pairs):,} of which are read as their orthologue'
  )
  return vocabulary


def _whole(path: str, table: Mapping[str, float]) -> dict[str, int]:
  for name, number in table.items():
    if number != int(number) or not 0 <= number < 1 << 31:
      raise errors.UserError(
        f'{path}: {name!r} has {number}, which is no token: tokens are whole '
        'numbers from 0'
      )
  return {name: int(number) for name, number in table.items()}


def _pairs(path: str) -> dict[int, int]:
  """{mouse token: human token}, in the order of the file."""
  table = _whole(path, dictionaries.load(path, ('human', 'token')))
  if unknown := [name for name in table if not name.isdecimal()]:
    raise errors.UserError(
      f'{path}: {unknown[0]!r} is no token; the map is of mouse to human tokens'
    )
  return {int(mouse): human for mouse, human in table.items()}


def _check_pairs(
  path: str, pairs: Mapping[int, int], homologs_V: np.ndarray
) -> None:
  """Refuses a map that is not the one which the weights hold, inverted."""
  mice: dict[int, set[int]] = {}
  for mouse, human in pairs.items():
    mice.setdefault(human, set()).add(mouse)
  wrong = [
    token
    for token, mouse in enumerate(homologs_V.tolist())
    if mouse not in mice.get(token, {token})
  ]
  wrong += [token for token in mice if token >= len(homologs_V)]
  if wrong:
    raise errors.UserError(
      f'{path}: {len(wrong)} of {len(homologs_V)} tokens have another '
      f'orthologue than in homologous_index of the weights, token {wrong[0]} '
      'for one; the map must be {mouse token: human token} of this model'
    )


def _released_medians(
  files: Sequence[str],
  vocabulary: vocabulary_lib.Vocabulary,
  notes: list[str],
) -> medians_lib.Medians:
  """Medians of dictionaries, of one species or several.

  They do not say how many cells stand behind a median: each is taken as
  supported.
  """
  shape = len(vocabulary.species), vocabulary.size
  median_SV, support_SV = np.full(shape, np.nan), np.zeros(shape, np.int64)
  median_of: dict[str, float] = {}
  for path in files:
    for gene_id, value in dictionaries.load(path, ('median',)).items():
      if not value > 0:
        raise errors.UserError(
          f'{path}: {gene_id!r} has {value}; medians of counts that are not '
          'zero are more than 0'
        )
      if median_of.setdefault(gene_id, value) != value:
        raise errors.UserError(
          f'{path}: {gene_id!r} has {value}, in a file before '
          f'{median_of[gene_id]}'
        )
  unknown = 0
  for gene_id, value in median_of.items():
    row = vocabulary.genes.row_of.get(gene_id)
    if row is None:
      unknown += 1
      continue
    place = vocabulary.genes.species_G[row], vocabulary.token_G[row]
    median_SV[place] = value
    support_SV[place] = medians_lib.MIN_SUPPORT
  if not support_SV.any():
    raise errors.UserError(
      f'{", ".join(files)}: no median is of a gene of this vocabulary; keys '
      'are Ensembl ids'
    )
  medians = medians_lib.Medians(
    encoding_lib.RELEASED,
    median_SV,
    support_SV,
    vocabulary.is_shared_V(),
    vocabulary.naming_species_V(),
  )
  is_human = bool(support_SV[0].any())
  for species, name in enumerate(vocabulary.species):
    tokens = vocabulary.species_tokens(species)
    source = np.where(
      is_human & medians.is_shared_V, medians.naming_species_V, species
    )[tokens]
    known = int((support_SV[source, tokens] > 0).sum())
    notes.append(
      f'medians: {known:,} of {len(tokens):,} tokens of {name} cells, counts of '
      'others are divided by 1'
    )
  shared = 'human' if is_human else 'mouse, for lack of human ones'
  notes.append(f'medians of tokens that both species share: {shared}')
  if unknown:
    notes.append(f'medians: {unknown:,} genes are not in the vocabulary')
  return medians
