package vmtest

import (
	"os"
	"path/filepath"
	"sort"
	"strings"
)

// source is one entry of the machine's apt configuration: where from, and which
// suites.
type source struct {
	uri    string
	suites []string
}

// machineSources reads the apt sources below root (normally "/"), in both of
// apt's formats (sources.list(5)). Files that cannot be read are left out.
func machineSources(root string) []source {
	var all []source
	files := []string{filepath.Join(root, "etc/apt/sources.list")}
	for _, pattern := range []string{"*.list", "*.sources"} {
		// The only error of Glob is a bad pattern.
		more, _ := filepath.Glob(filepath.Join(root, "etc/apt/sources.list.d", pattern))
		files = append(files, more...)
	}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		if strings.HasSuffix(f, ".sources") {
			all = append(all, parseDeb822(string(data))...)
		} else {
			all = append(all, parseOneLine(string(data))...)
		}
	}
	return all
}

// parseOneLine reads "deb [options] URI SUITE COMPONENT…" lines.
func parseOneLine(text string) []source {
	var all []source
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		fields := strings.Fields(line)
		if len(fields) == 0 || fields[0] != "deb" {
			continue
		}
		fields = fields[1:]
		if len(fields) > 0 && strings.HasPrefix(fields[0], "[") {
			for len(fields) > 0 {
				last := strings.HasSuffix(fields[0], "]")
				fields = fields[1:]
				if last {
					break
				}
			}
		}
		if len(fields) >= 2 {
			all = append(all, source{uri: fields[0], suites: fields[1:2]})
		}
	}
	return all
}

// parseDeb822 reads stanzas with Types, URIs and Suites fields.
func parseDeb822(text string) []source {
	var all []source
	field := map[string][]string{}
	last := ""
	end := func() {
		if has(field["types"], "deb") && !has(field["enabled"], "no") && !has(field["enabled"], "false") {
			for _, uri := range field["uris"] {
				all = append(all, source{uri: uri, suites: field["suites"]})
			}
		}
		field, last = map[string][]string{}, ""
	}
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, " \t\r\n")
		switch {
		case line == "":
			end()
		case line[0] == '#':
		case line[0] == ' ' || line[0] == '\t':
			field[last] = append(field[last], strings.Fields(line)...)
		default:
			name, value, _ := strings.Cut(line, ":")
			last = strings.ToLower(strings.TrimSpace(name))
			field[last] = strings.Fields(value)
		}
	}
	end()
	return all
}

func has(list []string, want string) bool {
	for _, s := range list {
		if strings.EqualFold(s, want) {
			return true
		}
	}
	return false
}

// debianMirrors picks, from a machine's sources, where Debian's archive and its
// security archive are. A source counts as Debian's by the suites that only the
// distribution itself has (…-updates, …-security); apt checks the signature in the
// end. Either is "" when the machine has none.
func debianMirrors(all []source) (archive, security string) {
	type candidate struct {
		uri  string
		rank int
	}
	var found []candidate
	for _, s := range all {
		for _, suite := range s.suites {
			uri := strings.TrimRight(s.uri, "/")
			switch {
			case strings.HasSuffix(suite, "-security"):
				if security == "" {
					security = uri
				}
			case strings.HasSuffix(suite, "-updates"):
				found = append(found, candidate{uri, 0})
			case strings.HasSuffix(uri, "/debian"):
				found = append(found, candidate{uri, 1})
			}
		}
	}
	sort.SliceStable(found, func(i, j int) bool { return found[i].rank < found[j].rank })
	if len(found) > 0 {
		archive = found[0].uri
	}
	return archive, security
}
