//! The prefill call's body: the client's, cut down to computing the prompt.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde_json::value::RawValue;

/// Why a body cannot be sent on.
#[derive(Debug, thiserror::Error)]
#[error("the request body is not a JSON object: {0}")]
pub struct BodyError(#[from] serde_json::Error);

/// The body for prefill: one token, not streamed, everything that decides the prompt's KV or its transfer key unchanged.
///
/// Values that stay are copied as they were written (a number keeps its digits), so both servers tokenise the same text.
/// `n` and the list of prompts stay because a transfer key contains their indices.
pub fn prefill_body(body: &[u8]) -> Result<Bytes, BodyError> {
    let mut fields: BTreeMap<String, &RawValue> = serde_json::from_slice(body)?;
    let one = literal("1")?;
    fields.insert("max_tokens".to_owned(), one);
    // The newer name wins over max_tokens in vLLM, so it must not keep the client's value; vLLM's completions endpoint
    // does not know it, so it is not added either.
    if let Some(limit) = fields.get_mut("max_completion_tokens") {
        *limit = one;
    }
    // vLLM refuses min_tokens > max_tokens, and stream_options without stream.
    fields.remove("min_tokens");
    fields.remove("stream_options");
    fields.insert("stream".to_owned(), literal("false")?);
    // Without streaming vLLM 0.15 parses the answer of a required tool call, and one token never parses. "none" keeps
    // the tools in the prompt, which is all that prefill needs.
    if let Some(choice) = fields.get_mut("tool_choice")
        && choice.get() == "\"required\""
    {
        *choice = literal("\"none\"")?;
    }
    Ok(Bytes::from(serde_json::to_vec(&fields)?))
}

fn literal(text: &'static str) -> Result<&'static RawValue, serde_json::Error> {
    serde_json::from_str(text)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn rewritten(body: &str) -> Value {
        serde_json::from_slice(&prefill_body(body.as_bytes()).unwrap()).unwrap()
    }

    #[test]
    fn prefill_is_asked_for_one_token_and_no_stream() {
        let body = r#"{"model":"m","prompt":"x","max_tokens":200,"min_tokens":20,"stream":true,
            "stream_options":{"include_usage":true},"temperature":0.7,"seed":3}"#;
        assert_eq!(
            rewritten(body),
            json!({"model":"m","prompt":"x","max_tokens":1,"stream":false,"temperature":0.7,"seed":3})
        );
    }

    #[test]
    fn max_completion_tokens_is_limited_only_where_it_was_sent() {
        assert_eq!(
            rewritten(r#"{"max_completion_tokens":50}"#)["max_completion_tokens"],
            1
        );
        assert_eq!(
            rewritten(r#"{"max_completion_tokens":null}"#)["max_completion_tokens"],
            1
        );
        assert_eq!(rewritten("{}").get("max_completion_tokens"), None);
        assert_eq!(rewritten("{}")["max_tokens"], 1);
    }

    #[test]
    fn everything_else_keeps_its_spelling() {
        let kept = [
            r#""n":2"#,
            r#""prompt":["a",  "b\u00e9\ud800"]"#,
            r#""temperature":0.70000000000000000001"#,
            r#""logit_bias":{"12345678901234567890123":1e-400}"#,
            r#""tools":[{"type":"function"}]"#,
            r#""messages":[{"role":"user","content":"\u0041"}]"#,
        ];
        let body = format!("{{{}}}", kept.join(" , "));
        let result = String::from_utf8(prefill_body(body.as_bytes()).unwrap().to_vec()).unwrap();
        for field in kept {
            assert!(result.contains(field), "{field} is not in {result}");
        }
    }

    #[test]
    fn a_required_tool_call_is_not_parsed_out_of_one_token() {
        assert_eq!(rewritten(r#"{"tool_choice":"required"}"#)["tool_choice"], "none");
        assert_eq!(rewritten(r#"{"tool_choice":"auto"}"#)["tool_choice"], "auto");
        let named = r#"{"tool_choice":{"type":"function","function":{"name":"f"}}}"#;
        assert_eq!(rewritten(named)["tool_choice"]["function"]["name"], "f");
    }

    #[test]
    fn bodies_that_are_no_json_object_are_refused() {
        for body in [
            "",
            "{",
            "[]",
            "1",
            "null",
            "{\"a\":}",
            "{\"a\":1}x",
            "\u{0}",
            "{'a':1}",
        ] {
            assert!(prefill_body(body.as_bytes()).is_err(), "{body}");
        }
        assert!(prefill_body(b"{\"prompt\":\"\xff\"}").is_err());
    }
}
