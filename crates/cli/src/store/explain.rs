//! `kvlane store explain`: which blocks of given tokens are there, and why the first missing one is missing.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use clap::Args;
use kvlane_core::{Chain, ChainRoot};
use kvlane_fs::inspect::{self, BlockInfo, ExplainReport, Explanation, Presence, Progress};
use serde::Serialize;

use super::progress::with_bar;
use super::{FolderArguments, StoreError, existing_store, tokens};
use crate::descriptors::{Names, NamespaceName};
use crate::exit::Exit;
use crate::output::{Report, show};

/// Say which blocks of given tokens are there, and why the first missing one is missing.
///
/// A block is found by all tokens up to its end, the cache salt, the LoRA adapter and the images; requests with an
/// adapter or images cannot be explained this way.
#[derive(Args, Debug)]
pub(super) struct ExplainArguments {
    #[command(flatten)]
    folder: FolderArguments,
    /// File with the prompt's token ids, - for standard input: a JSON list, the answer of a server's /tokenize, or
    /// numbers with space between.
    #[arg(long, value_name = "FILE")]
    tokens: PathBuf,
    /// Tokens per block: the servers' --block-size [default: what running servers say in the folder; needed if none runs].
    #[arg(long, value_name = "COUNT")]
    block_tokens: Option<u32>,
    /// The request's cache_salt.
    #[arg(long, value_name = "SALT")]
    cache_salt: Option<String>,
}

pub(super) fn run(arguments: &ExplainArguments) -> Result<Exit, StoreError> {
    let folder = existing_store(&arguments.folder.path)?;
    let epoch = inspect::epoch(&folder)?;
    let names = Names::read(&folder, epoch);
    let sizes: BTreeSet<u32> = match arguments.block_tokens {
        Some(given) => [given].into(),
        None => names.current().map(|(_, name)| name.block_tokens).collect(),
    };
    if sizes.is_empty() {
        return Err(StoreError::BlockTokensUnknown(Names::folder(&folder)));
    }
    let tokens = tokens::read(&arguments.tokens).map_err(|source| StoreError::Tokens {
        from: arguments.tokens.display().to_string(),
        source,
    })?;
    let mut namespaces: BTreeMap<String, NamespaceReport> = BTreeMap::new();
    let mut rejected_files = 0;
    for block_tokens in sizes {
        let chain = chain(&tokens, block_tokens, arguments.cache_salt.as_deref())?;
        let found = with_bar(arguments.folder.json, |progress| {
            explain(&folder, &chain, &names, progress)
        })?;
        rejected_files = found.rejected_files;
        for explanation in found.namespaces {
            let report = NamespaceReport::new(explanation, &chain, &names, epoch, block_tokens);
            if arguments.block_tokens.is_none() && report.is_of_another_size() {
                continue;
            }
            // Where nobody says how large a namespace's blocks are, the size that finds most is the right one.
            let best = namespaces
                .get(&report.namespace)
                .is_none_or(|other| report.present_blocks > other.present_blocks);
            if best {
                namespaces.insert(report.namespace.clone(), report);
            }
        }
    }
    let report = ChainReport {
        path: folder.display().to_string(),
        tokens: tokens.len(),
        rejected_files,
        servers: names
            .servers()
            .filter_map(|ranks| ServerReport::new(ranks, &namespaces))
            .collect(),
        namespaces: namespaces.into_values().collect(),
    };
    Ok(show(&report, arguments.folder.json))
}

fn chain(tokens: &[u32], block_tokens: u32, cache_salt: Option<&str>) -> Result<Chain, StoreError> {
    let mut root = ChainRoot::new(block_tokens)?;
    if let Some(salt) = cache_salt {
        root = root.with_cache_salt(salt);
    }
    let mut chain = Chain::new(&root);
    chain.extend(tokens.iter().copied());
    Ok(chain)
}

/// What the folder has in every namespace that it has anything of, or that a server named.
fn explain(
    folder: &Path,
    chain: &Chain,
    names: &Names,
    progress: Progress<'_>,
) -> Result<ExplainReport, StoreError> {
    let mut found = inspect::explain(folder, &chain.keys(), progress)?;
    for (namespace, _) in names.current() {
        let found = &mut found.namespaces;
        if !found.iter().any(|other| other.namespace == *namespace) {
            found.push(Explanation::nothing(namespace.clone(), chain.block_count()));
        }
    }
    Ok(found)
}

#[derive(Serialize)]
struct ChainReport {
    path: String,
    tokens: usize,
    /// Of these nothing is known; `ls` names them.
    rejected_files: u64,
    servers: Vec<ServerReport>,
    namespaces: Vec<NamespaceReport>,
}

/// What all ranks of a server have together: it loads a block only if every one of them can.
#[derive(Serialize)]
struct ServerReport {
    model: String,
    namespaces: Vec<String>,
    ready_blocks: usize,
    first_miss: Option<String>,
}

impl ServerReport {
    fn new(ranks: &BTreeSet<String>, found: &BTreeMap<String, NamespaceReport>) -> Option<Self> {
        let reports: Option<Vec<&NamespaceReport>> = ranks.iter().map(|rank| found.get(rank)).collect();
        let (ready_blocks, worst) = reports?
            .into_iter()
            .filter_map(|report| Some((report.ready_blocks?, report)))
            .min_by_key(|(ready_blocks, _)| *ready_blocks)?;
        let name = worst.name.as_ref()?;
        Some(Self {
            model: name.model.clone(),
            namespaces: ranks.iter().cloned().collect(),
            ready_blocks,
            first_miss: worst
                .first_miss
                .as_ref()
                .map(|reason| format!("{}: {reason}", name.rank())),
        })
    }

    fn text(&self) -> String {
        let mut text = format!(
            "\nall {} ranks of {} together: {} leading blocks can be had\n",
            self.namespaces.len(),
            self.model,
            self.ready_blocks
        );
        if let Some(reason) = &self.first_miss {
            text += &format!("  first miss: {reason}\n");
        }
        text
    }
}

#[derive(Serialize)]
struct NamespaceReport {
    namespace: String,
    /// Null where no descriptor tells.
    name: Option<NamespaceName>,
    block_tokens: u32,
    /// Tokens behind the last full block: they are never stored.
    rest_tokens: u64,
    /// Leading blocks that can be had; null where nothing tells whether they are from before a reset.
    ready_blocks: Option<usize>,
    present_blocks: usize,
    first_miss: Option<String>,
    blocks: Vec<BlockInfo>,
}

impl NamespaceReport {
    fn new(explanation: Explanation, chain: &Chain, names: &Names, epoch: u64, block_tokens: u32) -> Self {
        let name = names.get(&explanation.namespace).cloned();
        let (ready_blocks, first_miss) = match &name {
            Some(name) if !name.is_current => {
                let reason = "the cache was reset since: nothing of this namespace is found any more";
                (Some(0), Some(reason.to_owned()))
            }
            // A namespace is a hash, also of the epoch: only a descriptor tells which epoch that is.
            None if epoch > 0 && explanation.ready_blocks > 0 => {
                let otherwise = explanation.first_miss.as_deref().unwrap_or("there is none");
                let reason = format!(
                    "block 0 if all of this is of before a reset (the cache was reset, and no descriptor tells); \
                     else {otherwise}"
                );
                (None, Some(reason))
            }
            _ => (Some(explanation.ready_blocks), explanation.first_miss),
        };
        Self {
            rest_tokens: chain.token_count() - chain.block_count() as u64 * u64::from(block_tokens),
            ready_blocks,
            namespace: explanation.namespace,
            name,
            block_tokens,
            present_blocks: explanation.present_blocks,
            first_miss,
            blocks: explanation.blocks,
        }
    }

    fn is_of_another_size(&self) -> bool {
        let size = self.name.as_ref().map(|name| name.block_tokens);
        size.is_some_and(|size| size != self.block_tokens)
    }
}

impl Report for ChainReport {
    fn text(&self) -> String {
        let mut text = format!("{}: {} tokens\n", self.path, self.tokens);
        match self.rejected_files {
            0 => {}
            1 => text += "1 file is not usable (see `store ls`): what is in it counts as not there\n",
            files => {
                text += &format!(
                    "{files} files are not usable (see `store ls`): what is in them counts as not there\n"
                )
            }
        }
        if self.namespaces.is_empty() {
            let usable = if self.rejected_files > 0 { " usable" } else { "" };
            text += &format!("first miss: nothing{usable} is stored in this folder\n");
        }
        for namespace in &self.namespaces {
            text += &namespace.text();
        }
        // Of a single rank it would say the same again.
        for server in self.servers.iter().filter(|server| server.namespaces.len() > 1) {
            text += &server.text();
        }
        text
    }
}

impl NamespaceReport {
    fn text(&self) -> String {
        let name = self
            .name
            .as_ref()
            .map_or_else(|| "no descriptor names it".to_owned(), NamespaceName::line);
        let mut text = format!(
            "\nnamespace {} ({name})\n  {} blocks of {} tokens",
            &self.namespace[..16],
            self.blocks.len(),
            self.block_tokens
        );
        if self.rest_tokens > 0 {
            text += &format!(
                ", and {} tokens that fill no block and are never stored",
                self.rest_tokens
            );
        }
        text += "\n";
        if let Some(name) = &self.name
            && self.is_of_another_size()
        {
            text += &format!(
                "  the servers' blocks have {} tokens: leave --block-tokens out\n",
                name.block_tokens
            );
        }
        let mut first = 0;
        for group in self.blocks.chunk_by(|one, next| one.state == next.state) {
            let end = first + group.len();
            let range = match group.len() {
                1 => format!("block {first}"),
                _ => format!("blocks {first} to {}", end - 1),
            };
            text += &format!("  {range}: {}\n", state_text(group[0].state));
            first = end;
        }
        text += &match &self.first_miss {
            Some(reason) => format!("  first miss: {reason}\n"),
            None => "  no miss: all full blocks can be had\n".to_owned(),
        };
        text
    }
}

fn state_text(state: Presence) -> &'static str {
    match state {
        Presence::Ready => "there",
        Presence::Writing => "being written",
        Presence::Promised => "promised",
        Presence::Overdue => "promised too long ago",
        Presence::Orphaned => "promised by a writer that is gone",
        Presence::Bad => "damaged",
        Presence::Absent => "not there",
        _ => "unknown",
    }
}
