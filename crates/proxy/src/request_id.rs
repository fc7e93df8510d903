//! The request id that ties a prefill call to its decode call, and how to read it back from an engine's id.
//!
//! The proxy sends `___prefill_addr_{host:port}___decode_addr_{host:port}_{32 hex}` as `X-Request-Id` to both servers.
//! vLLM wraps that header before its connectors see it: endpoint prefix, prompt index, child index of `n > 1`, and a
//! suffix of eight random hex digits that differs between the two engines.

/// Builds the `X-Request-Id` for one client request; the last part is random.
pub fn transfer_id(prefill_address: &str, decode_address: &str) -> String {
    format!(
        "___prefill_addr_{prefill_address}___decode_addr_{decode_address}_{}",
        unique_part()
    )
}

/// 32 random hex digits: the id of a request that has no prefill, which connectors do not take for a transfer.
pub fn unique_part() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// The endpoint that an engine's request id names in its prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/completions`.
    Completion,
    /// `/v1/chat/completions`.
    Chat,
    /// `/inference/v1/generate`, tokens in and out.
    GenerateTokens,
}

/// An engine's request id, taken apart. Two engines work on the same sequence exactly when `header`, `prompt_index` and
/// `child` agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineRequestId<'a> {
    /// The endpoint that was called.
    pub endpoint: Endpoint,
    /// Which of the `n` sequences of a prompt.
    pub child: u32,
    /// Which of the prompts of one completion call.
    pub prompt_index: u32,
    /// The `X-Request-Id` that was sent.
    pub header: &'a str,
}

/// The addresses inside a header built by [`transfer_id`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransferAddresses<'a> {
    /// Prefill's host and port.
    pub prefill: (&'a str, u16),
    /// Decode's host and port.
    pub decode: (&'a str, u16),
    /// What tells this request from all others.
    pub unique: &'a str,
}

impl<'a> EngineRequestId<'a> {
    /// Takes an engine's id apart. `randomised`: the engine appends its random suffix (always before vLLM 0.17, later
    /// unless `VLLM_DISABLE_REQUEST_ID_RANDOMIZATION` is set). `None`: not an id of an endpoint that can be split.
    pub fn parse(id: &'a str, randomised: bool) -> Option<Self> {
        let (child, id) = match id.split_once('_') {
            Some((digits, rest)) if is_number(digits) => (digits.parse().ok()?, rest),
            _ => (0, id),
        };
        let (endpoint, rest) = [
            ("chatcmpl-", Endpoint::Chat),
            ("cmpl-", Endpoint::Completion),
            ("generate-tokens-", Endpoint::GenerateTokens),
        ]
        .into_iter()
        .find_map(|(prefix, endpoint)| Some((endpoint, id.strip_prefix(prefix)?)))?;
        let rest = if randomised {
            strip_random_suffix(rest)?
        } else {
            rest
        };
        // Only completions carry a prompt index; a chat header that ends in digits must stay whole.
        let (header, prompt_index) = match (endpoint, rest.rsplit_once('-')) {
            (Endpoint::Completion, Some((header, digits))) if is_number(digits) => {
                (header, digits.parse().ok()?)
            }
            (Endpoint::Completion, _) => return None,
            _ => (rest, 0),
        };
        Some(Self {
            endpoint,
            child,
            prompt_index,
            header,
        })
    }
}

impl<'a> TransferAddresses<'a> {
    /// Finds the addresses in a header; `None` when it was not built by a prefill/decode proxy.
    pub fn parse(header: &'a str) -> Option<Self> {
        const PREFILL: &str = "___prefill_addr_";
        const DECODE: &str = "___decode_addr_";
        let rest = &header[header.find(PREFILL)? + PREFILL.len()..];
        rest.match_indices(DECODE).find_map(|(at, _)| {
            let prefill = host_port(&rest[..at])?;
            let tail = &rest[at + DECODE.len()..];
            tail.rmatch_indices(':').find_map(|(colon, _)| {
                let (port, unique) = tail[colon + 1..].split_once('_')?;
                let decode = (&tail[..colon], number(port)?);
                (!decode.0.is_empty() && !unique.is_empty()).then_some(Self {
                    prefill,
                    decode,
                    unique,
                })
            })
        })
    }
}

fn strip_random_suffix(id: &str) -> Option<&str> {
    let (rest, suffix) = id.rsplit_once('-')?;
    (suffix.len() == 8
        && suffix
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')))
    .then_some(rest)
}

fn host_port(text: &str) -> Option<(&str, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    (!host.is_empty()).then_some((host, number(port)?))
}

fn number(text: &str) -> Option<u16> {
    // `parse` alone would take "+1".
    is_number(text).then(|| text.parse().ok())?
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADERS: [&str; 4] = [
        "___prefill_addr_10.0.0.1:8000___decode_addr_10.0.0.2:8001_0123456789abcdef0123456789abcdef",
        "___prefill_addr_[::1]:14579___decode_addr_[fe80::2]:14580_11111111111111111111111111111111",
        "___prefill_addr_vllm-prefill-fs:80___decode_addr_my_decode:80_0e2f-4a77-aa11-12345678",
        "plain-client-id-7",
    ];

    /// The table of how vLLM wraps a header, per endpoint: id, endpoint, child, prompt index.
    fn wrapped(header: &str, suffix: &str) -> Vec<(String, Endpoint, u32, u32)> {
        vec![
            (format!("cmpl-{header}-0{suffix}"), Endpoint::Completion, 0, 0),
            (format!("cmpl-{header}-3{suffix}"), Endpoint::Completion, 0, 3),
            (format!("2_cmpl-{header}-0{suffix}"), Endpoint::Completion, 2, 0),
            (
                format!("10_cmpl-{header}-12{suffix}"),
                Endpoint::Completion,
                10,
                12,
            ),
            (format!("chatcmpl-{header}{suffix}"), Endpoint::Chat, 0, 0),
            (format!("1_chatcmpl-{header}{suffix}"), Endpoint::Chat, 1, 0),
            (
                format!("generate-tokens-{header}{suffix}"),
                Endpoint::GenerateTokens,
                0,
                0,
            ),
        ]
    }

    #[test]
    fn every_form_in_which_an_engine_wraps_the_header_gives_the_header_back() {
        // An all-digit suffix looks like a prompt index, hence both.
        for (suffix, randomised) in [("-0a1b2c3d", true), ("-12345678", true), ("", false)] {
            for header in HEADERS {
                for (id, endpoint, child, prompt_index) in wrapped(header, suffix) {
                    let parsed = EngineRequestId::parse(&id, randomised);
                    assert_eq!(
                        parsed,
                        Some(EngineRequestId {
                            endpoint,
                            child,
                            prompt_index,
                            header
                        }),
                        "{id}"
                    );
                }
            }
        }
    }

    #[test]
    fn ids_of_other_calls_are_not_taken_for_transfers() {
        for id in [
            "resp_0123456789abcdef_0-0a1b2c3d",
            "17-0a1b2c3d",
            "4-0a1b2c3d-beam-1",
            "embd-x-0-0a1b2c3d",
            "cmpl-H-0",
            "cmpl-H-0-0A1B2C3D",
            "cmpl-H-0a1b2c3d",
            "",
        ] {
            assert_eq!(EngineRequestId::parse(id, true), None, "{id}");
        }
    }

    #[test]
    fn built_ids_name_both_addresses_and_never_repeat() {
        for (prefill, decode) in [
            ("10.0.0.1:8000", "10.0.0.2:8001"),
            ("[::1]:14579", "[fe80::2]:1"),
            ("a_b:1", "c___d:2"),
        ] {
            let id = transfer_id(prefill, decode);
            let parsed = TransferAddresses::parse(&id).unwrap();
            assert_eq!(format!("{}:{}", parsed.prefill.0, parsed.prefill.1), prefill);
            assert_eq!(format!("{}:{}", parsed.decode.0, parsed.decode.1), decode);
            assert_eq!(parsed.unique.len(), 32);
            assert!(parsed.unique.bytes().all(|byte| byte.is_ascii_hexdigit()));
            assert_ne!(id, transfer_id(prefill, decode));
        }
    }

    #[test]
    fn headers_without_both_addresses_carry_none() {
        for header in [
            "plain",
            "___prefill_addr_a:1",
            "___prefill_addr_a___decode_addr_b_0123",
            "___prefill_addr_a:1___decode_addr_b_0123",
            "___prefill_addr_a:1___decode_addr_b:2",
            "___prefill_addr_a:1___decode_addr_b:2_",
            "___prefill_addr_a:99999___decode_addr_b:2_x",
            "___prefill_addr_:1___decode_addr_b:2_x",
        ] {
            assert_eq!(TransferAddresses::parse(header), None, "{header}");
        }
        assert_eq!(TransferAddresses::parse(&unique_part()), None);
        let wrapped = format!("cmpl-{}-0-0a1b2c3d", HEADERS[0]);
        assert_eq!(
            TransferAddresses::parse(&wrapped).unwrap().prefill,
            ("10.0.0.1", 8000),
            "searched, not matched"
        );
    }
}
