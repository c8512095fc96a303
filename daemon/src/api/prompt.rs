//! `prompt` and `tokens` of a body, read into what they are: a list of token ids as JSON values takes thirty times its
//! size on the wire, as ids twice.

use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// Prompts that are kept; more of them are only counted.
const MOST_KEPT: usize = 1024;

/// A list of token ids, or of prompts.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct List {
    /// Ids beyond 32 bits are `u32::MAX`, which is in no vocabulary.
    pub(crate) ids: Vec<u32>,
    /// The first [`MOST_KEPT`] prompts.
    pub(crate) prompts: Vec<Prompt>,
    /// All items, kept or not.
    pub(crate) len: usize,
    /// What the first item is that is neither, or another than those before it.
    pub(crate) stranger: Option<&'static str>,
}

/// One of several prompts.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Prompt {
    Text(String),
    Ids(List),
}

/// An item of a list.
enum Item {
    Id(u32),
    Prompt(Prompt),
    Stranger(&'static str),
}

impl List {
    fn push(&mut self, item: Item) {
        self.len += 1;
        match item {
            Item::Id(id) if self.prompts.is_empty() => self.ids.push(id),
            Item::Id(_) => self.odd("a number among prompts"),
            Item::Prompt(_) if !self.ids.is_empty() => self.odd("a prompt among token ids"),
            Item::Prompt(prompt) if self.prompts.len() < MOST_KEPT => self.prompts.push(prompt),
            Item::Prompt(_) => {}
            Item::Stranger(kind) => self.odd(kind),
        }
    }

    fn odd(&mut self, kind: &'static str) {
        self.stranger.get_or_insert(kind);
    }
}

impl<'de> Deserialize<'de> for List {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Items;
        impl<'de> Visitor<'de> for Items {
            type Value = List;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<List, A::Error> {
                read(items)
            }
        }
        deserializer.deserialize_seq(Items)
    }
}

fn read<'de, A: SeqAccess<'de>>(mut items: A) -> Result<List, A::Error> {
    let mut list = List::default();
    while let Some(item) = items.next_element()? {
        list.push(item);
    }
    Ok(list)
}

impl<'de> Deserialize<'de> for Item {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyItem)
    }
}

struct AnyItem;

impl<'de> Visitor<'de> for AnyItem {
    type Value = Item;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }
    fn visit_u64<E>(self, id: u64) -> Result<Item, E> {
        Ok(Item::Id(u32::try_from(id).unwrap_or(u32::MAX)))
    }
    fn visit_i64<E>(self, _: i64) -> Result<Item, E> {
        Ok(Item::Stranger("a negative number"))
    }
    fn visit_f64<E>(self, _: f64) -> Result<Item, E> {
        Ok(Item::Stranger("a fraction"))
    }
    fn visit_bool<E>(self, _: bool) -> Result<Item, E> {
        Ok(Item::Stranger("a boolean"))
    }
    fn visit_unit<E>(self) -> Result<Item, E> {
        Ok(Item::Stranger("null"))
    }
    fn visit_str<E>(self, text: &str) -> Result<Item, E> {
        Ok(Item::Prompt(Prompt::Text(text.to_owned())))
    }
    fn visit_string<E>(self, text: String) -> Result<Item, E> {
        Ok(Item::Prompt(Prompt::Text(text)))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<Item, A::Error> {
        Ok(Item::Prompt(Prompt::Ids(read(items)?)))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Item, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Item::Stranger("an object"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(json: &str) -> List {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn ids_and_prompts_are_told_apart_and_strangers_are_named() {
        assert_eq!(list("[1,2,99999999999]").ids, [1, 2, u32::MAX]);
        let two = list(r#"["a",[3,4]]"#);
        assert_eq!((two.len, &two.prompts[0]), (2, &Prompt::Text("a".to_owned())));
        assert_eq!(two.prompts[1], Prompt::Ids(list("[3,4]")));
        for (json, stranger) in [
            ("[-1]", "a negative number"),
            ("[1.5]", "a fraction"),
            ("[null]", "null"),
            ("[{\"a\":1}]", "an object"),
            ("[1,\"a\"]", "a prompt among token ids"),
            ("[\"a\",1]", "a number among prompts"),
        ] {
            assert_eq!(list(json).stranger, Some(stranger), "{json}");
        }
    }

    #[test]
    fn prompts_beyond_what_anybody_may_send_are_only_counted() {
        let many = list(&format!("[{}\"\"]", "\"\",".repeat(5000)));
        assert_eq!((many.len, many.prompts.len()), (5001, MOST_KEPT));
    }
}
