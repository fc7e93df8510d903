//! Token ids as people have them: a JSON list, the answer of a server's /tokenize, or numbers with space between.

use std::io::{self, Read};
use std::path::Path;

use serde::Deserialize;

/// Far above any context window; bounds what a wrong file costs.
const TEXT_BYTES_MAX: u64 = 256 << 20;

/// Why there are no token ids.
#[derive(Debug, thiserror::Error)]
pub(super) enum TokensError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it is not a JSON list of token ids: {0}")]
    Json(#[from] serde_json::Error),
    #[error("word {position} is '{found}', allowed: token ids from 0 to {}", u32::MAX)]
    Word { position: usize, found: String },
    #[error("it is longer than {TEXT_BYTES_MAX} bytes")]
    TooLong,
}

/// Reads token ids from a file, or from standard input if it is named `-`.
pub(super) fn read(from: &Path) -> Result<Vec<u32>, TokensError> {
    let mut text = String::new();
    let source: Box<dyn Read> = if from == Path::new("-") {
        Box::new(io::stdin().lock())
    } else {
        Box::new(std::fs::File::open(from)?)
    };
    if source.take(TEXT_BYTES_MAX).read_to_string(&mut text)? as u64 == TEXT_BYTES_MAX {
        return Err(TokensError::TooLong);
    }
    parse(&text)
}

/// vLLM's answer to /tokenize has more fields, which do not matter here.
#[derive(Deserialize)]
struct Tokenized {
    tokens: Vec<u32>,
}

fn parse(text: &str) -> Result<Vec<u32>, TokensError> {
    let text = text.trim();
    match text.chars().next() {
        Some('[') => Ok(serde_json::from_str(text)?),
        Some('{') => Ok(serde_json::from_str::<Tokenized>(text)?.tokens),
        _ => text
            .split_whitespace()
            .enumerate()
            .map(|(at, word)| {
                word.parse().map_err(|_| TokensError::Word {
                    position: at + 1,
                    found: word.chars().take(40).collect(),
                })
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_words_and_tokenize_answers_mean_the_same() {
        for text in [
            "[1, 2, 4294967295]",
            " 1\n2\t4294967295 \n",
            r#"{"count":3,"tokens":[1,2,4294967295]}"#,
        ] {
            assert_eq!(parse(text).unwrap(), [1, 2, u32::MAX], "{text}");
        }
        assert!(parse("").unwrap().is_empty());
    }

    #[test]
    fn what_is_no_token_id_is_named() {
        let message = parse("1 2 three").unwrap_err().to_string();
        assert!(message.contains("word 3 is 'three'"), "{message}");
        for text in ["-1", "4294967296", "1,2", "[1, -2]", "[1.5]", r#"["a"]"#, "[1"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
