"""Groups of related genes: HGNC gene groups, FamPlex, any table of groups.

Left out by rule, because their members share a way of being named and not a
function: groups whose name says so (`NAMED_ALIKE`), and groups of which less
than half of the known members are protein-coding, unless they are called a
family (the microRNA families).
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from scipy import sparse

from genecompass_jax import errors, gene_table, paths
from genecompass_jax.prepare.priors import files, names, pairs as pairs_lib

NAMED_ALIKE = re.compile(
  r'host genes|encoded by multiple genes|pseudoautosomal|^CD molecules|'
  r'uncharacterized|root symbol|non-systematic|low confidence|transcripts$|'
  r'^antisense RNAs|^long intergenic|^microRNAs$|orphons$',
  re.IGNORECASE,
)
_IS_FAMILY = re.compile(r'\bfamily$', re.IGNORECASE)


@dataclasses.dataclass(frozen=True, eq=False)
class Groups:
  """Memberships of genes in groups.

  Attributes:
    gene_M: int32 rows of the gene table.
    group_M: int32 numbers of groups.
    titles: of the groups.
    facts: file, sha256, licence, and what was lost.
  """

  gene_M: np.ndarray
  group_M: np.ndarray
  titles: tuple[str, ...]
  facts: dict


def read(
  path: paths.PathLike,
  species: int,
  genes: gene_table.GeneTable,
  licence: str = '',
) -> Groups:
  """Reads the HGNC complete set, HGNC members, FamPlex relations or a table.

  A plain table has two columns, group and gene. Every level of FamPlex is a
  group of all genes below it.

  Raises:
    UserError: no such file, other columns, or names of another species.
  """
  facts = files.source(path, licence)
  statements = _statements(path)
  facts['memberships_in_file'] = len(statements)
  group_of: dict[str, int] = {}
  titles: list[str] = []
  for key, title, _ in statements:
    if key not in group_of:
      group_of[key] = len(titles)
      titles.append(title)
  row_M, report = names.rows([name for *_, name in statements], species, genes)
  names.check_known(path, report)
  group_M = np.array([group_of[key] for key, *_ in statements], np.int32)
  both_M2 = np.unique(np.stack([group_M, row_M], 1)[row_M >= 0], axis=0)
  facts |= {'species': gene_table.SPECIES[species], 'members': report}
  return Groups(both_M2[:, 1], both_M2[:, 0], tuple(titles), facts)


def meaningful(groups: Groups, genes: gene_table.GeneTable) -> Groups:
  """The groups that the rule keeps, of two members at least; see above."""
  number = len(groups.titles)
  size_K = np.bincount(groups.group_M, minlength=number)
  is_coding_G = np.array([b == 'protein_coding' for b in genes.biotypes])
  coding_K = np.bincount(
    groups.group_M, is_coding_G[groups.gene_M], minlength=number
  )
  named_K = np.array([bool(NAMED_ALIKE.search(t)) for t in groups.titles], bool)
  family_K = np.array([bool(_IS_FAMILY.search(t)) for t in groups.titles], bool)
  rna_K = (2 * coding_K < size_K) & ~family_K
  keep_K = (size_K >= 2) & ~named_K & ~rna_K

  def listed(which_K):
    order = np.argsort(-size_K[which_K], kind='stable')
    at = np.flatnonzero(which_K)[order]
    return {
      'groups': int(which_K.sum()),
      'largest': [f'{groups.titles[k]} ({size_K[k]})' for k in at[:12]],
    }

  keep_M = keep_K[groups.group_M]
  facts = groups.facts | {
    'groups_in_file': number,
    'groups_kept': int(keep_K.sum()),
    'memberships_kept': int(keep_M.sum()),
    'left_out_by_name': listed(named_K & (size_K >= 2)),
    'left_out_as_rna': listed(rna_K & ~named_K & (size_K >= 2)),
    'groups_of_less_than_two_known_genes': int((size_K < 2).sum()),
  }
  return Groups(
    groups.gene_M[keep_M], groups.group_M[keep_M], groups.titles, facts
  )


def by_orthology(groups: Groups, genes: gene_table.GeneTable) -> Groups:
  """The same groups of the one-to-one orthologues, in the other species."""
  partner_M = names.orthologue_rows(genes)[groups.gene_M]
  known_M = partner_M >= 0
  facts = {
    'from': 'one-to-one orthologues',
    'members_with_orthologue': int(known_M.sum()),
    'members_without': int((~known_M).sum()),
  }
  return Groups(
    partner_M[known_M], groups.group_M[known_M], groups.titles, facts
  )


def to_pairs(
  several: Sequence[Groups], sources: Sequence[str], is_lifted: Sequence[bool]
) -> pairs_lib.Pairs:
  """Pairs of members of a group, of weight 1/size, added over groups.

  Args:
    several: groups of each source.
    sources: their names.
    is_lifted: which of them came by orthology.
  """
  parts = []
  for number, groups in enumerate(several):
    size = int(groups.gene_M.max(initial=-1)) + 1
    size_K = np.bincount(groups.group_M, minlength=len(groups.titles))
    weight_M = 1 / size_K[groups.group_M]
    shape = (size, len(groups.titles))
    place = (groups.gene_M, groups.group_M)
    member_GK = sparse.csr_array((np.ones(len(weight_M)), place), shape)
    share_GK = sparse.csr_array((weight_M, place), shape)
    upper = sparse.triu(share_GK @ member_GK.T, 1).tocoo()
    parts.append((upper.row, upper.col, upper.data, np.full(upper.nnz, number)))
  if not parts or not sum(len(part[0]) for part in parts):
    raise errors.UserError('no two genes of the tables share a group')
  a_N, b_N, weight_N, source_N = map(np.concatenate, zip(*parts))
  lifted_N = np.asarray(is_lifted)[source_N]
  return pairs_lib.collect(
    a_N, b_N, weight_N, source_N, lifted_N, sources, merge='sum'
  )


def _statements(path: paths.PathLike) -> list[tuple[str, str, str]]:
  """(key of a group, its title, gene) of every membership."""
  name = str(path).rsplit('/', 1)[-1].lower()
  if 'relations' in name and '.csv' in name:
    return _famplex(path)
  frame = files.table(path)
  has = set(frame.columns)
  gene = next(
    (c for c in ('ensembl_gene_id', 'symbol') if c in has), frame.columns[-1]
  )
  symbol = frame['symbol'] if 'symbol' in has else frame[gene]
  gene = frame[gene].where(frame[gene] != '', symbol)
  if {'gene_group_id', 'gene_group'} <= has:  # joined by bars
    return [
      (key, title, name)
      for keys, names_, name in zip(
        frame['gene_group_id'], frame['gene_group'], gene
      )
      for key, title in zip(keys.split('|'), names_.split('|'))
      if key
    ]
  if {'group_id', 'group_name'} <= has:
    return list(zip(frame['group_id'], frame['group_name'], gene))
  if frame.shape[1] == 2:
    group = frame.iloc[:, 0]
    return list(zip(group, group, frame.iloc[:, 1]))
  raise errors.UserError(
    f'{path}: not a table of groups; it needs the columns of HGNC '
    '(gene_group, gene_group_id, symbol or ensembl_gene_id), or two columns, '
    f'group and gene; it has: {", ".join(frame.columns)}'
  )


def _famplex(path: paths.PathLike) -> list[tuple[str, str, str]]:
  """Genes of every FamPlex entity, through the entities below it."""
  frame = files.table(path, header=False)
  if frame.shape[1] != 5:
    raise errors.UserError(f'{path}: relations of FamPlex have five columns')
  above: dict[tuple[str, str], set[str]] = {}
  for kind, name, _, _, entity in frame.itertuples(index=False):
    above.setdefault((kind, name), set()).add(entity)
  found = []
  for kind, name in above:
    if kind != 'HGNC':
      continue
    reached, todo = set(), [('HGNC', name)]
    while todo:
      for entity in above.get(todo.pop(), ()):
        if entity not in reached:
          reached.add(entity)
          todo.append(('FPLX', entity))
    found += [(entity, entity, name) for entity in sorted(reached)]
  return found
