//! What has been complained about: what is tried again and again must not fill a log.

use std::collections::HashSet;

/// What was wrong the last time.
#[derive(Debug, Default)]
pub(crate) struct Complaints(HashSet<String>);

impl Complaints {
    /// Of what is wrong now, that which was not wrong the last time. Something is said again once it has been all right.
    pub(crate) fn news(&mut self, wrong: impl IntoIterator<Item = String>) -> Vec<String> {
        let wrong: HashSet<String> = wrong.into_iter().collect();
        let mut news: Vec<String> = wrong.difference(&self.0).cloned().collect();
        news.sort_unstable();
        self.0 = wrong;
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_complaint_is_made_once_until_it_was_all_right_in_between() {
        let mut complaints = Complaints::default();
        let news = |complaints: &mut Complaints, wrong: &[&str]| {
            complaints.news(wrong.iter().map(|wrong| (*wrong).to_owned()))
        };
        assert_eq!(news(&mut complaints, &["a"]), ["a"]);
        assert!(news(&mut complaints, &["a"]).is_empty());
        assert_eq!(news(&mut complaints, &["b", "a"]), ["b"]);
        assert!(news(&mut complaints, &[]).is_empty());
        assert_eq!(news(&mut complaints, &["a"]), ["a"]);
    }
}
