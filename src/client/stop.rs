//! Stop strings: text is held back for as long as it may be the start of one.

/// Watches a stream of text for stop strings.
#[derive(Debug, Clone)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
}

/// What may be shown after a piece of text arrived.
#[derive(Debug, PartialEq, Eq)]
pub struct Released {
    /// Text that is certain not to be part of a stop string.
    pub text: String,
    /// Whether a stop string was found: nothing may follow, and neither it nor what came behind it is in the text.
    pub stopped: bool,
}

impl StopStrings {
    /// Watches for any of `stops`; empty ones would stop at once and are left out.
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        Self { stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(), held: String::new() }
    }

    /// Takes the next piece of text. The earliest stop string counts, wherever the pieces were cut.
    pub fn push(&mut self, piece: &str) -> Released {
        self.held.push_str(piece);
        if let Some(found) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            let text = self.held[..found].to_owned();
            self.held.clear();
            return Released { text, stopped: true };
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let text = self.held.drain(..self.held.len() - keep).collect();
        Released { text, stopped: false }
    }

    /// Lets out what was held back, at the end of the stream.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// The length of the longest end of `text` that is a start of `stop`, in bytes.
fn overlap(text: &str, stop: &str) -> usize {
    (1..stop.len().min(text.len() + 1))
        .rev()
        .find(|&length| stop.is_char_boundary(length) && text.ends_with(&stop[..length]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut watch = StopStrings::new(stops.iter().map(|s| (*s).to_owned()));
        let mut shown = String::new();
        for piece in pieces {
            let released = watch.push(piece);
            shown += &released.text;
            if released.stopped {
                return (shown, true);
            }
        }
        (shown + &watch.finish(), false)
    }

    #[test]
    fn a_stop_string_cut_over_pieces_is_found_and_not_shown() {
        assert_eq!(run(&["END"], &["some E", "N", "D more"]), ("some ".to_owned(), true));
        assert_eq!(run(&["END"], &["some E", "Nd"]), ("some ENd".to_owned(), false));
        assert_eq!(run(&["b", "ab"], &["xab"]), ("x".to_owned(), true));
        assert_eq!(run(&["\n\n"], &["a\n", "b\n", "\nc"]), ("a\nb".to_owned(), true));
        assert_eq!(run(&[""], &["a"]), ("a".to_owned(), false));
        assert_eq!(run(&["é!"], &["caf", "é", "?"]), ("café?".to_owned(), false));
    }

    #[test]
    fn text_that_can_be_no_stop_is_not_held() {
        let mut watch = StopStrings::new(["END".to_owned()]);
        assert_eq!(watch.push("hello E").text, "hello ");
        assert_eq!(watch.push("x").text, "Ex");
    }

    proptest! {
        #[test]
        fn how_the_text_is_cut_changes_nothing(text in "[abé]{0,20}", stop in "[abé]{1,4}", cuts in any::<u32>()) {
            let mut pieces = vec![String::new()];
            for (index, character) in text.chars().enumerate() {
                if cuts >> index & 1 == 1 {
                    pieces.push(String::new());
                }
                pieces.last_mut().unwrap().push(character);
            }
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            prop_assert_eq!(run(&[&stop], &pieces), run(&[&stop], &[&text]));
            let expected = text.find(&stop).map_or(text.as_str(), |at| &text[..at]);
            prop_assert_eq!(run(&[&stop], &pieces).0, expected);
        }
    }
}
